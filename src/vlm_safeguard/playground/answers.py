"""Answers a request twice with one model: unguarded, then guarded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event as Flag
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import TextStreamer

from vlm_safeguard.artifact.config import GuardConfig
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import find_decoder, hidden_of, watch_layer
from vlm_safeguard.runtime.attestation import Decision

Side = Literal["unguarded", "guarded"]
SIDES: tuple[Side, ...] = ("unguarded", "guarded")


@dataclass(frozen=True)
class Decided:
    """The gates are decided. Comes before any text.

    Attributes:
        decision: what the guard decided.
        as_text: state (d,) of the request without its picture; None if it has none, or if the
            text-only pass ends below the layer.
        as_asked: state (d,) of the request itself, unsteered.
    """

    decision: Decision
    as_text: Tensor | None
    as_asked: Tensor


@dataclass(frozen=True)
class SideText:
    """A piece of an answer."""

    side: Side
    text: str


@dataclass(frozen=True)
class SideDone:
    """An answer is complete, or was cut at the limit of tokens."""

    side: Side
    cut: bool


Event = Decided | SideText | SideDone


def state_layer(config: GuardConfig) -> int:
    """The layer whose states are shown: the last one that a gate in the VLM reads, or, in a guard
    without such a gate, that any gate reads."""
    gates = [gate for gate in config.gates if gate.source == "vlm"] or config.gates
    return max(layer for gate in gates for layer in gate.layers)


class Answerer:
    """Answers requests with one model and one guard.

    Args:
        loaded: the model and its processor.
        guard: a guard of this model.
        max_new_tokens: longest answer.
    """

    def __init__(self, loaded: LoadedModel, guard: Guard, max_new_tokens: int) -> None:
        self.loaded, self.guard, self.max_new_tokens = loaded, guard, max_new_tokens
        self.layer = state_layer(guard.config)
        self._probe = len(guard.config.probe)

    @torch.inference_mode()
    def answer(self, query: Query, tell: Callable[[Event], None], stopped: Flag) -> None:
        """Answer greedily, unguarded and then guarded.

        For the unguarded answer the guard is attached as a monitor: its gates decide, and nothing
        is steered. So the verdict is known, and the states are unsteered.

        Args:
            query: the request.
            tell: is called with each event.
            stopped: set by another thread to end the answers early.

        Raises:
            SafeguardError: the request cannot be encoded, or the guard cannot do its work.
        """
        inputs = encode(self.loaded, [query.text], [query.image], reads_pictures(self.guard))
        for side in SIDES:
            if stopped.is_set():
                return
            if side == "unguarded":
                with self._watched() as states:
                    self._generate(side, inputs, query, states, tell, stopped)
            else:
                self._generate(side, inputs, query, None, tell, stopped)

    def _generate(
        self,
        side: Side,
        inputs: dict[str, Tensor],
        query: Query,
        states: list[Tensor] | None,
        tell: Callable[[Event], None],
        stopped: Flag,
    ) -> None:
        """One answer. With ``states`` the verdict is told too."""
        model, processor = self.loaded.model, self.loaded.processor
        with self.guard.attach(model, processor, monitor=side == "unguarded") as session:
            if states is not None:
                states.clear()  # of the chat template's beginning, which attach runs

            def begun() -> None:
                if states is not None:
                    whole = query.image is not None and len(states) > 1
                    as_text = states[0][-1 - self._probe] if whole else None
                    tell(Decided(session.decisions[0], as_text, states[-1][-1]))

            output = model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                streamer=_Pieces(processor.tokenizer, begun, lambda t: tell(SideText(side, t))),
                stopping_criteria=[lambda ids, *_, **__: _all(ids, stopped.is_set())],
            )
        new = output.shape[1] - inputs["input_ids"].shape[1]
        tell(SideDone(side, cut=new >= self.max_new_tokens))

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """States (n, d) at the last tokens after ``layer``, of each pass over a whole prompt: first
        the text-only pass, if it gets there, with the guard's probe at its end, then the request's
        own."""
        seen: list[Tensor] = []

        def see(output: Any) -> None:
            hidden = hidden_of(output)
            if hidden.shape[1] > 1:  # decoding steps are one column wide
                seen.append(hidden[0, -1 - self._probe :].float().cpu())

        # Before the guard's own hooks: the text-only pass ends at the last of them.
        hook = watch_layer(find_decoder(self.loaded.model), self.layer, see)
        try:
            yield seen
        finally:
            hook.remove()


class _Pieces(TextStreamer):
    """Calls ``begun`` at the first new token, and hands finished words to ``put_text``."""

    def __init__(
        self, tokenizer: Any, begun: Callable[[], None], put_text: Callable[[str], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._begun, self._put_text, self._calls = begun, put_text, 0

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompt
            self._begun()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._put_text(text)


def _all(ids: Tensor, value: bool) -> Tensor:
    return torch.full((len(ids),), value, device=ids.device)
