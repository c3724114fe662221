"""A guard at work on one model: hooks, the state of the current request, and what it decided.

One request (a ``generate`` call, or a forward pass that starts without a cache) is one
``_Request``. It is made anew at each start and dropped at the end, so nothing can leak into the
next. Per row of the batch it holds the gate, latched at the last prompt token, and the
coordinates to put back.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlm_safeguard import method
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.models import find_decoder, hidden_of, replace_hidden
from vlm_safeguard.settings import GuardConfig
from vlm_safeguard.witness import (
    ImageMarkup,
    positions_of,
    text_columns,
    text_only,
    text_pass,
)

_MARK = "_vlm_safeguard_session"
_UNSUPPORTED = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate")


class _EnoughSeen(Exception):
    """Ends the text-only pass: no layer above is needed."""


@dataclass
class _Request:
    """State of one request; tensors have one row per sequence of the batch."""

    prompt_width: int
    last_prompt: Tensor  # (B,) column of q
    text_columns: Tensor | None  # (B, T) columns of the text-only reading
    scores: dict[int, Tensor] = field(default_factory=dict)  # gate index -> (B, n), NaN: unread
    opened: dict[int, Tensor] = field(default_factory=dict)  # the same; (B, 1) if pooled
    text_coordinates: dict[int, Tensor] = field(default_factory=dict)
    pass_coordinates: dict[int, Tensor] = field(default_factory=dict)
    cache: Any = None
    first: int = 0  # first column of the current forward call
    end: int = 0  # one past its last column
    done: int = 0  # columns that finished calls have gone through
    idle: bool = False  # nothing to do in the current forward call

    def repeat(self, times: int) -> None:
        """One row per beam or returned sequence, in the order generate expands them."""
        for name in ("last_prompt", "text_columns"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.repeat_interleave(times, 0))
        for table in (self.scores, self.opened, self.text_coordinates):
            for key in table:
                table[key] = table[key].repeat_interleave(times, 0)


@dataclass(frozen=True)
class Decision:
    """What the guard decided for one row of the last request."""

    fired: bool
    by_text: bool
    by_vlm: bool
    scores: dict[str, list[float]]


class Session:
    """Made by ``Guard.attach``. ``decisions`` tells what happened in the last request."""

    def __init__(
        self, config: GuardConfig, tensors: dict[str, Tensor], markup: ImageMarkup, model: Any
    ) -> None:
        self.config, self.model, self.markup = config, model, markup
        self.decoder = find_decoder(model)
        self._steer = config.steering
        self._directions = {
            layer: self._near(layer, tensors[f"directions.{layer}"]) for layer in self._steer.layers
        }
        self._anchor = {
            layer: self._near(layer, tensors[f"anchor.{layer}"]) for layer in self._steer.layers
        }
        self._vectors = [
            {
                layer: self._near(layer, tensors[f"gate.{i}"][n : n + 1])
                for n, layer in enumerate(gate.layers)
            }
            for i, gate in enumerate(config.gates)
        ]
        text_gates = {n for g in config.gates if g.source == "text" for n in g.layers}
        vlm_gates = {n for g in config.gates if g.source == "vlm" for n in g.layers}
        steered = set(self._steer.layers)
        self._follows_text = (
            self._steer.mode == "restore" and self._steer.reference == "text"
        ) or (self._steer.mode == "add" and self._steer.query == "text")
        self._text_gate_layers = text_gates
        self._witness_layers = text_gates | (steered if self._follows_text else set())
        self._layers = sorted(self._witness_layers | vlm_gates | steered)
        self._request: _Request | None = None
        self._witnessed: _Request | None = None  # the request whose text is being read
        self._witness_seen: set[int] = set()
        self._calls = 0
        self._in_forward = False
        self._in_generate = False
        self._busy = threading.Lock()
        self._handles: list[Any] = []
        self._decisions: list[Decision] = []

    def _near(self, layer: int, tensor: Tensor) -> Tensor:
        """On the device of its layer."""
        return tensor.to(next(self.decoder.layers[layer].parameters()).device)

    # -- attaching -------------------------------------------------------------------------------

    def arm(self) -> None:
        """Put the hooks in. Called by ``Guard.attach``."""
        if getattr(self.model, _MARK, None) is not None:
            raise GuardError("a guard is attached to this model already: leave its `with` first")
        if getattr(self.model, "_compiled_call_impl", None) is not None or hasattr(
            self.model, "_orig_mod"
        ):
            raise GuardError(
                "the model is compiled: hooks put in after torch.compile are ignored. Attach the "
                "guard first, then compile"
            )
        setattr(self.model, _MARK, self)
        for layer in self._layers:
            hook = self._layer_hook(layer)
            self._handles.append(self.decoder.layers[layer].register_forward_hook(hook))
        self._handles.append(
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        )
        self._handles.append(
            self.model.register_forward_hook(self._after_forward, always_call=True)
        )
        self._own_generate = self.model.__dict__.get("generate")
        self._plain_generate = self.model.generate
        self.model.generate = self._generate

    def disarm(self) -> None:
        """Take everything out again, once a ``generate`` in another thread is through."""
        with self._busy:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._request = None
            if getattr(self.model, _MARK, None) is self:
                delattr(self.model, _MARK)
                del self.model.generate
                if self._own_generate is not None:
                    self.model.generate = self._own_generate

    @property
    def decisions(self) -> list[Decision]:
        """One decision per row of the last request, in batch order."""
        return list(self._decisions)

    # -- the course of a request -----------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` under guard: the request begins with the whole prompt."""
        if not self._busy.acquire(blocking=False):
            raise GuardRuntimeError("this model is generating already: one call at a time")
        try:
            for name in _UNSUPPORTED:
                if kwargs.get(name) is not None:
                    raise GuardRuntimeError(f"generate({name}=...) is not guarded: leave it out")
            given = args[0] if args else kwargs.get("inputs")
            prompt = given if given is not None else kwargs.get("input_ids")
            self._begin(prompt, kwargs.get("attention_mask"), kwargs.get("inputs_embeds"))
            request = self._request
            if request is None or bool((request.last_prompt != request.prompt_width - 1).any()):
                raise GuardRuntimeError("generate continues at the last column: pad on the left")
            self._in_generate = True
            return self._plain_generate(*args, **kwargs)
        finally:
            self._in_generate, self._request = False, None
            self._busy.release()

    def _begin(self, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None) -> None:
        """Start a request: who it is, and what the LLM says of it as text."""
        self._request, self._decisions = None, []
        if ids is None and (self._witness_layers or self._steer.mode == "defer"):
            raise GuardRuntimeError(
                "the guard reads the request's text from input_ids, which are missing"
                + (" (only inputs_embeds were given)" if embeds is not None else "")
                + ": pass input_ids"
            )
        shape_of = ids if ids is not None else embeds
        if shape_of is None:
            raise GuardRuntimeError("a forward call without input_ids cannot be guarded")
        if shape_of.shape[1] == 0:
            raise GuardRuntimeError("the prompt is empty")
        if embeds is not None and embeds.shape[:2] != shape_of.shape[:2]:
            raise GuardRuntimeError("input_ids and inputs_embeds differ in length")
        if mask is None:
            mask = torch.ones(shape_of.shape[:2], device=shape_of.device, dtype=torch.long)
            if ids is not None:  # without a mask, only what leads a row can be padding
                mask = ((ids != self.config.markup.pad_id).cumsum(1) > 0).long()
        if mask.ndim != 2 or mask.shape != shape_of.shape[:2]:
            raise GuardRuntimeError(
                f"the attention mask must have the prompt's shape {tuple(shape_of.shape[:2])}, "
                f"got {tuple(mask.shape)}"
            )
        if not bool(mask.any(1).all()):
            raise GuardRuntimeError("a row of the batch holds no token")
        rows, width = mask.shape
        last = width - 1 - mask.long().flip(1).argmax(1)
        columns = None if ids is None else text_columns(ids, mask, self.markup)
        request = _Request(width, last, columns)
        for index, gate in enumerate(self.config.gates):
            request.scores[index] = torch.full((rows, len(gate.layers)), torch.nan).to(mask.device)
        if self._witness_layers and ids is not None and columns is not None:
            if not bool(columns.any(1).all()):
                raise GuardRuntimeError("a row of the batch holds no text beside its pictures")
            self._ask_witness(request, *text_only(ids, columns, self.config.markup.pad_id))
        self._request = request

    @torch.no_grad()
    def _ask_witness(self, request: _Request, ids: Tensor, mask: Tensor) -> None:
        """The text-only pass: gate scores and coordinates at its last token."""
        self._witnessed, self._witness_seen = request, set()
        try:
            with suppress(_EnoughSeen):
                text_pass(self.model, ids, mask)
        finally:
            self._witnessed = None
        needed = self._witness_layers if self._wants_text(request) else self._text_gate_layers
        missing = needed - self._witness_seen
        if missing:
            raise GuardRuntimeError(f"the text-only pass did not reach layers {sorted(missing)}")

    def _hear_witness(self, request: _Request, layer: int, state: Tensor) -> None:
        """Read one layer (B, d) of the text-only pass; ends the pass once it has said enough."""
        for index, gate in enumerate(self.config.gates):
            if gate.source == "text" and layer in gate.layers:
                self._score(request, index, layer, state)
        if self._follows_text and layer in self._directions:
            request.text_coordinates[layer] = method.coordinates(state, self._directions[layer])
        self._witness_seen.add(layer)
        last = self._witness_layers if self._wants_text(request) else self._text_gate_layers
        if not last - self._witness_seen:
            raise _EnoughSeen

    def _wants_text(self, request: _Request) -> bool:
        """Whether the text's coordinates are put to use: where every text gate stayed shut,
        ``restore`` takes the anchors' (see ``_target``)."""
        if not self._follows_text:
            return False
        if (
            self._steer.mode == "add"
            or not self._text_gate_layers
            or self._text_gate_layers - self._witness_seen
        ):
            return True
        return bool(self._fired(request, "text").any())

    def _score(self, request: _Request, index: int, layer: int, states: Tensor) -> None:
        """Score gate ``index`` at one layer for states (B, d); latch it once it can be decided."""
        gate = self.config.gates[index]
        place = gate.layers.index(layer)
        threshold = torch.tensor(gate.thresholds[place : place + 1], device=states.device)
        score = method.gate_scores(states.unsqueeze(1), self._vectors[index][layer], threshold)
        known = request.scores[index]
        if not torch.isfinite(score).all():
            raise GuardRuntimeError("the request is blocked: a gate score is NaN or Inf")
        known[:, place] = score[:, 0].to(known.device)
        if gate.per_layer:
            request.opened[index] = known > 0  # layers still unread are NaN, so closed
        elif torch.isfinite(known).all():
            request.opened[index] = method.gate_open(known.sum(1, keepdim=True))

    def _open(
        self, request: _Request, layer: int, source: str | None = None, at_prompt: bool = False
    ) -> Tensor:
        """Rows (B,) open at a layer, by gates of one source or any.

        At the prompt's own columns a pooled gate of the request's own pass acts from its last
        layer on, because below that it is not decided yet; so it is in every later call.
        """
        rows = torch.zeros_like(request.last_prompt, dtype=torch.bool)
        for index, opened in request.opened.items():
            gate = self.config.gates[index]
            if source not in (None, gate.source):
                continue
            if gate.per_layer:
                if layer in gate.layers:
                    rows = rows | opened[:, gate.layers.index(layer)]
            elif not (at_prompt and gate.source == "vlm" and layer < max(gate.layers)):
                rows = rows | opened[:, 0]
        return rows

    def _fired(self, request: _Request, source: str) -> Tensor:
        """Rows (B,) that any gate of a source opened at any layer."""
        rows = torch.zeros_like(request.last_prompt, dtype=torch.bool)
        for index, opened in request.opened.items():
            if self.config.gates[index].source == source:
                rows = rows | opened.any(1)
        return rows

    # -- hooks -----------------------------------------------------------------------------------

    def _before_forward(self, _: nn.Module, args: tuple, kwargs: dict) -> Any:
        if len(args) > 1:
            raise GuardRuntimeError("under guard, pass everything after input_ids by keyword")
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        cache = kwargs.get("past_key_values")
        current = ids if ids is not None else embeds
        if current is None:
            raise GuardRuntimeError("a forward call without input_ids cannot be guarded")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if not self._in_generate and past == 0:
            self._begin(ids, kwargs.get("attention_mask"), embeds)
        request = self._check_course(cache, past, current.shape[1])
        request.cache = cache
        rows = len(request.last_prompt)
        if len(current) != rows:
            if len(current) % rows or not self._in_generate or request.done:
                raise GuardRuntimeError(f"the request has {rows} rows, the call {len(current)}")
            request.repeat(len(current) // rows)
        request.first, request.end = past, past + current.shape[1]
        request.idle = request.first >= request.prompt_width and not self._doses(request)
        self._calls, self._in_forward = 0, True
        if self._steer.mode == "defer" and bool(self._fired(request, "text").any()):
            return args, self._without_pictures(request, kwargs)
        return None

    def _check_course(self, cache: Any, past: int, length: int) -> _Request:
        """The current request; refuses a call that does not carry it on."""
        request = self._request
        if request is None or (past and past != request.done and request.done):
            raise GuardRuntimeError(
                "this cache was not filled under the guard: start the request from its prompt"
            )
        if request.done:
            if past and request.cache is not cache:
                raise GuardRuntimeError(
                    "this cache belongs to another request than the guarded one"
                )
            if past and length > 1 and not self._in_generate:
                raise GuardRuntimeError(
                    "more than one token on top of a cache: a new turn or a chunk of a prompt "
                    "would escape the gate. Start from the whole prompt"
                )
            if not past and length < request.done:
                raise GuardRuntimeError("a forward call inside generate is not of its request")
            return request
        if past >= request.prompt_width:
            raise GuardRuntimeError("the cache holds the whole prompt: the gate would not be read")
        partial = past > 0 or length < request.prompt_width
        if partial and self._steer.positions == "all":
            raise GuardRuntimeError(
                "positions `all` needs the prompt in one call: no prefix cache, no chunks"
            )
        if past and self._steer.mode == "defer":
            raise GuardRuntimeError("`defer` cannot take pictures out of a prefix cache")
        return request

    def _doses(self, request: _Request) -> bool:
        """Whether a decoding call still lies within the guarded tokens of an open row."""
        tokens = self._steer.tokens
        over = tokens is not None and request.first >= request.prompt_width + tokens - 1
        return (
            not over
            and bool(self._steer.layers)
            and any(bool(opened.any()) for opened in request.opened.values())
        )

    def _without_pictures(self, request: _Request, kwargs: dict) -> dict:
        """``defer``: rows with an open gate no longer attend to their pictures at all."""
        columns, given = request.text_columns, kwargs.get("attention_mask")
        flat = given is None or (isinstance(given, Tensor) and given.ndim == 2)
        if columns is None or not flat:
            raise GuardRuntimeError("`defer` needs input_ids and a two-dimensional attention mask")
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(request.first, request.end, device=columns.device)[None]
        if positions.ndim != 2:
            raise GuardRuntimeError("`defer` needs two-dimensional position ids")
        if given is None:
            given = torch.ones(len(columns), request.end, dtype=torch.long, device=columns.device)
        fired = self._fired(request, "text")[:, None]
        mask = given.clone()
        prompt = mask[:, : request.prompt_width]
        prompt[fired & ~columns[:, : prompt.shape[1]]] = 0
        own = positions_of(mask)[:, request.first : request.end]
        return kwargs | {
            "attention_mask": mask,
            "position_ids": torch.where(fired, own, positions),
        }

    def _after_forward(self, _: nn.Module, __: Any, output: Any) -> None:
        self._in_forward, request = False, self._request
        if output is None or request is None:  # an exception is on its way
            self._request = None
            return
        if self._calls != len(self._layers):
            self._request = None
            raise GuardRuntimeError(
                f"{self._calls} of {len(self._layers)} guarded layers ran: the guard's hooks were "
                "removed or bypassed, and the output is withheld"
            )
        if request.done < request.prompt_width <= request.end:
            self._decisions = self._decide(request)
        request.done = request.end

    def _layer_hook(self, layer: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if self._witnessed is not None:
                self._hear_witness(self._witnessed, layer, hidden_of(output)[:, -1].float())
                return None
            self._calls += 1
            request = self._request
            if request is None or not self._in_forward:
                raise GuardRuntimeError("the decoder ran outside the guarded model's forward call")
            if request.idle:
                return None
            changed = self._steer_layer(layer, hidden_of(output), request)
            return None if changed is None else replace_hidden(output, changed)

        return hook

    def _steer_layer(self, layer: int, hidden: Tensor, request: _Request) -> Tensor | None:
        """Read the gate at q, then steer the open rows of ``hidden`` (B, T, d)."""
        last = request.last_prompt.to(hidden.device)
        if request.done < request.prompt_width <= request.end:
            at = last - request.first
            if bool((at < 0).any()):
                raise GuardRuntimeError("a row's prompt ends before this chunk: pad on the left")
            state = hidden[torch.arange(len(hidden), device=hidden.device), at].float()
            self._read(layer, state, request)
        if layer not in self._directions:
            return None
        columns = torch.arange(request.first, request.end, device=hidden.device)
        rows = torch.where(
            columns < request.prompt_width,
            self._open(request, layer, at_prompt=True).to(hidden.device)[:, None],
            self._open(request, layer).to(hidden.device)[:, None],
        )
        if not bool(rows.any()):
            return None
        steer = self._steer
        places = method.steered_positions(
            columns, last, request.prompt_width, steer.tokens, steer.positions == "all"
        )
        directions = self._directions[layer]
        if steer.mode == "erase":
            moved = method.erase(hidden, directions)
        elif steer.mode == "add":
            if steer.query == "pass" and layer not in request.pass_coordinates:
                return None  # an early chunk: q is still to come
            moved = method.add(hidden, directions, self._added(layer, request), steer.alpha)
        else:
            moved = method.restore(hidden, directions, self._target(layer, request), steer.alpha)
        return torch.where((places & rows)[..., None], moved, hidden)

    def _read(self, layer: int, state: Tensor, request: _Request) -> None:
        """Gate and coordinates of the request's own pass, from its state (B, d) at q."""
        for index, gate in enumerate(self.config.gates):
            if gate.source == "vlm" and layer in gate.layers:
                self._score(request, index, layer, state)
        if layer in self._directions and self._steer.query == "pass":
            request.pass_coordinates[layer] = method.coordinates(state, self._directions[layer])

    def _added(self, layer: int, request: _Request) -> Tensor:
        """Coordinates that ``add`` adds, (B, m)."""
        if self._steer.query == "pass":
            return request.pass_coordinates[layer]
        return request.text_coordinates[layer]

    def _target(self, layer: int, request: _Request) -> Tensor:
        """Coordinates to restore (B, m). Text that the LLM itself finds harmless holds no harm to
        put back, so where a gate reads the text, rows opened by their picture alone take the
        anchors' mean."""
        anchor = self._anchor[layer].expand(len(request.last_prompt), -1)
        if self._steer.reference == "anchor":
            return anchor
        if not self._text_gate_layers:
            return request.text_coordinates[layer]
        if layer not in request.text_coordinates:  # no row was opened by its text
            return anchor
        by_text = self._open(request, layer, "text").to(anchor.device)[:, None]
        return torch.where(by_text, request.text_coordinates[layer], anchor)

    def _decide(self, request: _Request) -> list[Decision]:
        by_text, by_vlm = self._fired(request, "text"), self._fired(request, "vlm")
        named = {
            f"{self.config.gates[i].source}.{i}": scores for i, scores in request.scores.items()
        }
        return [
            Decision(
                bool(by_text[row] | by_vlm[row]),
                bool(by_text[row]),
                bool(by_vlm[row]),
                {name: scores[row].tolist() for name, scores in named.items()},
            )
            for row in range(len(by_text))
        ]
