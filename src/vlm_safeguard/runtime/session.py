"""A guard at work on one model: its hooks, and the course of a request through them.

Outside of them stands ``generate``, which begins a request with its whole prompt. Then, for each
forward call of the model: before it (``course``: does the call carry the request on?), at each
guarded layer (``gates`` read, ``dose`` steers, both from the state in ``request``), and after it
(did every guarded layer run?). What was done is told by ``attestation``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.model.loading import find_decoder, hidden_of
from vlm_safeguard.model.text_only import ImageMarkup
from vlm_safeguard.runtime import validation
from vlm_safeguard.runtime.attestation import Attestation, Decision, attest, decisions_of
from vlm_safeguard.runtime.compiling import uncompiled
from vlm_safeguard.runtime.defer import Deferral
from vlm_safeguard.runtime.gate import GateReader
from vlm_safeguard.runtime.hooks import Hooks
from vlm_safeguard.runtime.owner_thread import Turn
from vlm_safeguard.runtime.request import Request
from vlm_safeguard.runtime.steering import Steerer, step
from vlm_safeguard.runtime.text_pass import TextPass

# What a guarded layer's hook does with the layer's output: None lets it pass.
_Work = Callable[[int, Tensor], Tensor | None]


class Session:
    """Made by ``Guard.attach``. ``decisions`` and ``attestation`` tell of the last request."""

    def __init__(
        self, config: GuardConfig, tensors: dict[str, Tensor], markup: ImageMarkup, model: Any
    ) -> None:
        self.config, self.model, self.markup = config, model, markup
        decoder = find_decoder(model)
        self._deferral = Deferral(model, decoder) if config.steering.mode == "defer" else None
        gates = GateReader(config.gates, tensors)
        self._steerer = Steerer(config.steering, tensors, bool(gates.layers("text")))
        self._gates = gates
        # Guarded layers that ran in the current pass, in order, and at most one too many.
        self._seen: deque[int] = deque(maxlen=len(decoder.layers) + 1)
        self._text = TextPass(config, model, gates, self._steerer, self._seen)
        self._read_at = gates.layers("vlm") | self._steerer.reads
        self._layers = sorted(self._text.layers | gates.layers("vlm") | self._steerer.layers)
        self._hooks, self._turn = Hooks(model, decoder), Turn()
        self._other_tokens = validation.other_tokens(model)
        self._work: _Work | None = self._refuse
        self._in_generate = False
        self._announced = False  # a forward call came past the hooks and has not begun yet
        self._request: Request | None = None
        self._reported: Request | None = None  # the last request whose prompt was read

    @property
    def decisions(self) -> list[Decision]:
        """One decision per row of the last request, in batch order."""
        return [] if self._reported is None else decisions_of(self._reported)

    @property
    def attestation(self) -> Attestation | None:
        """What was done in the last request; None if none got through its prompt."""
        if self._reported is None:
            return None
        return attest(self._reported, tuple(self._layers))

    # -- attaching -------------------------------------------------------------------------------

    def arm(self) -> None:
        """Put the hooks on. Called by ``Guard.attach``.

        Raises:
            GuardError: a guard is attached already, or a part of the model is compiled. Whatever
                goes wrong, nothing stays on the model.
        """
        self._adapters = validation.adapters(self.model)
        self._plain_generate = self._hooks.put_on(
            self._before_forward,
            self._after_forward,
            self._generate,
            self._before_preparing,
            self._entering,
            self._interrupted,
            {layer: self._layer_hook(layer) for layer in self._layers},
        )

    def disarm(self) -> None:
        """Take everything off again, once a call in another thread is through.

        Raises:
            GuardRuntimeError: called from within a guarded ``generate``, which goes on.
        """
        if self._in_generate and self._turn.mine:
            raise GuardRuntimeError("the guard cannot be taken off inside its own generate")
        self._turn.wait()
        try:
            self._work = self._request = None
            self._hooks.take_off()
        finally:
            self._turn.give_back()

    # -- the course of a request -----------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` under guard: the request begins with the whole prompt."""
        self._turn.take()
        if self._in_generate:
            raise GuardRuntimeError("generate inside generate is not guarded")
        try:
            self._request = self._reported = None
            if not self._hooks.armed:
                raise GuardRuntimeError("this generate belongs to a guard that was taken off")
            if len(args) > 1:
                raise GuardRuntimeError("under guard, pass everything after the ids by keyword")
            text = validation.take_text(kwargs)
            validation.check_settings(self.model, kwargs)
            given = args[0] if args else kwargs.get("inputs")
            ids = given if given is not None else kwargs.get("input_ids")
            validation.check_padding_is_told(self.model, self.config, ids, kwargs, generating=True)
            request = self._begin(ids, kwargs, text)
            validation.check_left_padded(request)
            self._in_generate = True
            output = self._plain_generate(*args, **uncompiled(kwargs))
            self._hooks.check(of_layers=True)
            if not request.calls.passes:
                raise GuardRuntimeError("the guarded model did not run: the output is withheld")
            return output
        finally:
            self._in_generate, self._request, self._work = False, None, self._refuse
            self._turn.give_back()

    def _begin(
        self, ids: Tensor | None, options: dict[str, Any], text: tuple[Tensor, Tensor] | None
    ) -> Request:
        """Start a request: who it is, and what the LLM says of it as text."""
        if validation.adapters(self.model) != self._adapters:
            raise GuardRuntimeError(
                "an adapter was put on the model, taken off, switched or scaled since the guard "
                "was attached: the guard belongs to the weights it was calibrated on. Leave its "
                "`with` first, and attach a guard that was calibrated with these adapters at work"
            )
        validation.check_only_pictures(self._other_tokens, ids, options)
        if self.config.reads_pictures and text is None:
            validation.check_no_unread_picture(self.markup, ids, options)
        request, mask = validation.begin(
            self.config,
            self.markup,
            ids,
            options.get("attention_mask"),
            options.get("inputs_embeds"),
            (bool(self._text.layers) and text is None) or self.config.steering.mode == "defer",
            text,
        )
        validation.check_not_packed(options, mask)
        if text is None:
            validation.check_embeds(
                self.model, ids, options.get("inputs_embeds"), request.text_columns
            )
        if self._text.layers:
            self._work = self._text.hear
            try:
                self._text.read(request, ids, self._layers)
            finally:
                self._work = self._refuse
        self._request = request
        return request

    def _expected(self, request: Request) -> list[int]:
        """Guarded layers, in order, whose hooks run in the current forward call of a request."""
        return self._layers

    # -- hooks -----------------------------------------------------------------------------------

    def _before_preparing(self, options: Mapping[str, Any]) -> None:
        """Refuse a ``generate`` that went round ours: nobody looked at its settings and prompt."""
        if not self._in_generate or not self._turn.mine:
            raise GuardRuntimeError(
                "a generate that goes round the guard (the class's own, or one kept from before "
                "the guard was attached) is not guarded: call model.generate"
            )
        if options.get("is_first_iteration") and self._request and self._request.decided:
            raise GuardRuntimeError("generate inside generate is not guarded")

    def _before_forward(self, _: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Set the request to this forward call, or begin one, or refuse."""
        if not self._hooks.armed:  # kept in compiled code
            return None
        self._turn.take()
        self._work = self._refuse
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        begins = not self._in_generate and past == 0
        if begins:
            self._request = self._reported = None
        self._hooks.check()
        if len(args) > 1:
            raise GuardRuntimeError("under guard, pass everything after input_ids by keyword")
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        current = ids if ids is not None else embeds
        if current is None:
            raise GuardRuntimeError("a forward call without input_ids cannot be guarded")
        text = validation.take_text(kwargs)
        validation.check_not_packed(kwargs)
        if begins:
            validation.check_padding_is_told(self.model, self.config, ids, kwargs, generating=False)
            self._begin(ids, kwargs, text)
        elif text is not None:
            raise GuardRuntimeError("text_input_ids belong to the first call of a request")
        rows, length = current.shape[:2]
        request = validation.enter_call(self._request, cache, past, rows, length, self._in_generate)
        validation.check_prompt_in_parts(self.config, request)
        request.pieces = self._steerer.pieces(request)
        self._seen.clear()
        if request.reads_prompt:
            self._work = self._read_layer
        elif request.any_open and request.pieces:
            steps = self._steerer.one_more_step(request)
            self._work = self._step_layer if steps else self._steer_layer
        else:
            self._work = None  # no layer has anything to do but to be counted
        self._announced = True
        if self._deferral is not None:
            deferred = self._deferral.without_pictures(request, kwargs)
            if deferred is not None:
                return args, deferred
        return None if text is None else (args, kwargs)

    def _layer_hook(self, layer: int) -> Callable[[Any], Tensor | None]:
        def see(output: Any) -> Tensor | None:
            self._seen.append(layer)
            work = self._work
            return None if work is None else work(layer, hidden_of(output))

        def see_first(output: Any) -> Tensor | None:
            if not self._turn.mine and self._hooks.armed:
                # Another thread, or a call around the model's own: what `_work` says is not for it.
                self._refuse(layer, output)
            return see(output)

        # A pass that the first layer lets through is the model's own; asking everywhere costs.
        return see_first if layer == self._layers[0] else see

    def _refuse(self, _: int, __: Any) -> None:
        raise GuardRuntimeError("the decoder ran outside the guarded model's forward call")

    def _read_layer(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Read the gates at q of every row, then steer."""
        request = self._current()
        if layer in self._read_at:
            state = request.states_at_q(hidden)
            self._gates.read(request, "vlm", layer, state)
            self._steerer.read(request, layer, state)
        steered = self._steerer.steer(request, layer, hidden)
        if steered is not None:
            validation.mark_steered(request.cache)  # at once: the call may not come to its end
        return steered

    def _steer_layer(self, layer: int, hidden: Tensor) -> Tensor | None:
        return self._steerer.steer(self._current(), layer, hidden)

    def _step_layer(self, layer: int, hidden: Tensor) -> Tensor | None:
        """``_steer_layer`` for one more decoding step."""
        request = self._current()
        dose = request.later_doses.get(layer)
        return None if dose is None else step(dose, hidden)

    def _current(self) -> Request:
        if self._request is None:
            raise GuardRuntimeError("the decoder ran outside the guarded model's forward call")
        return self._request

    def _entering(self) -> None:
        """Refuse a call of the model's ``forward`` that did not come past its hooks."""
        if not self._hooks.armed:
            return
        if self._turn.mine:
            announced, self._announced = self._announced, False
            if announced or self._text.request is not None:
                return
        self._turn.take()  # or refuse: what another thread is at stays as it is
        self._request = self._reported = None
        if not self._in_generate:
            self._turn.give_back()
        raise GuardRuntimeError(
            "the model's forward ran outside of the guard's hooks (called by itself, or they were "
            "removed): call the model, and attach the guard last"
        )

    def _interrupted(self) -> None:
        """A forward call ended by what is no ``Exception`` (Ctrl-C, an exit), of which hooks are
        not told. Inside ``generate``, that itself cleans up."""
        if self._hooks.armed and self._turn.mine and not self._in_generate:
            self._request, self._work = None, self._refuse
            self._turn.give_back()

    def _after_forward(self, _: nn.Module, __: Any, output: Any) -> None:
        """Let the output out if every guarded layer ran."""
        if not self._hooks.armed or not self._turn.mine:
            return
        request, self._work = self._request, self._refuse
        try:
            if output is None or request is None:  # an exception is on its way
                self._request = None
                return
            expected = self._expected(request)
            if list(self._seen) != expected:
                self._request = self._reported = None
                raise GuardRuntimeError(
                    f"{len(self._seen)} of {len(expected)} guarded layers ran: the guard's hooks "
                    "were removed or bypassed, and the output is withheld"
                )
            request.calls.count(len(self._seen), len(expected))
            if request.cache is None:
                request.cache = validation.cache_of(output)
            if request.reads_prompt:
                if request.any_open:
                    validation.mark_steered(request.cache)
                self._reported = request
            request.leave()
        finally:
            if not self._in_generate:
                self._turn.give_back()
