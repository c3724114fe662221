"""A live check of the attached guard, on a harmful question beside a blank image.

Before the guard is attached to work, the question is asked with a guard that only watches: a gate
opens, and the logits are the model's own. A check asks it again: a gate opens, every hook runs, and
the logits have moved as far as they did at the first check.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_safeguard.data import drawings
from vlm_safeguard.data.prompts import anchors
from vlm_safeguard.errors import GuardRuntimeError
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.runtime.session import Session

CANDIDATES = 32
TOLERANCE = 0.02  # of the distance that the guard moves the logits
LEAST = 1e-3  # of their length: a guard that moves them less does nothing


class SelfCheck:
    """Chooses the question; ``run`` asks it.

    Args:
        loaded: the model, without a guard.
        guard: the guard.
        monitor: whether the guard that is checked only watches.

    Raises:
        GuardRuntimeError: no gate opens on any harmful anchor.
    """

    def __init__(self, loaded: LoadedModel, guard: Guard, monitor: bool) -> None:
        self._loaded, self._monitor = loaded, monitor
        self._reads = guard.config.reads_pictures
        self._moved: Tensor | None = None
        with guard.attach(loaded.model, loaded.processor, monitor=True) as session:
            for pair in anchors()[:CANDIDATES]:
                self._question = pair.harmful
                self._plain = self._logits()
                if session.decisions[0].fired:
                    return
        raise GuardRuntimeError(
            "self-check: no gate opens on any harmful anchor. Run `vlm-safeguard doctor`"
        )

    def run(self, session: Session) -> None:
        """Ask the question through the attached guard.

        Raises:
            GuardRuntimeError: every gate stays shut, a hook did not run, or the logits have not
                moved as at the first check.
        """
        logits = self._logits()
        told = session.attestation
        if told is None or not told.calls.made or told.calls.made != told.calls.expected:
            raise GuardRuntimeError(
                "self-check: hooks of the guard did not run. Restart the server"
            )
        if not told.rows[0].decision.fired:
            raise GuardRuntimeError(
                "self-check: no gate opened on a harmful question. Run `vlm-safeguard doctor`"
            )
        moved = logits - self._plain
        far = bool(moved.norm() > LEAST * self._plain.norm())
        if far == self._monitor:
            raise GuardRuntimeError(
                "self-check: the guard " + ("changed an answer" if far else "changes nothing")
            )
        if self._moved is None:
            self._moved = moved
        if far and (moved - self._moved).norm() > TOLERANCE * self._moved.norm():
            raise GuardRuntimeError(
                "self-check: the guard does not act as it did at the start. Restart the server"
            )

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        """Logits (vocabulary,) of the first token of the answer."""
        inputs = encode(self._loaded, [self._question], [drawings.blank()], self._reads)
        output = self._loaded.model(**inputs, use_cache=False)
        return output.logits[0, -1].float().cpu()
