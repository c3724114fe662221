"""Puts a guard's hooks on a model and takes them off again, whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vlm_safeguard.compiling import refuse_compiled, untraced
from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.models import Decoder, watch_layer

_MARK = "_vlm_safeguard_session"
_ARMING = threading.Lock()


class Hooks:
    """The hooks of one guard: on the model, on its guarded layers, and in place of ``generate``."""

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self.model, self.decoder, self.armed = model, decoder, False
        self._handles: list[Any] = []

    def put_on(
        self,
        before: Callable,
        after: Callable,
        generate: Callable,
        layers: Mapping[int, Callable[[Tensor], Tensor | None]],
    ) -> Callable:
        """Put everything on; returns the model's own ``generate``.

        Args:
            before: forward pre-hook of the model, with keywords.
            after: forward hook of the model, always called.
            generate: what stands in for ``model.generate``.
            layers: what sees the residual stream (B, T, d) after each guarded layer, in ascending
                order; what it returns takes the stream's place (see ``models.watch_layer``).

        Raises:
            GuardError: a guard is on already, or a part of the model is compiled. Whatever goes
                wrong, nothing stays on the model.
        """
        refuse_compiled(self.model)
        with _ARMING:
            if getattr(self.model, _MARK, None) is not None:
                raise GuardError(
                    "a guard is attached to this model already: leave its `with` first"
                )
            setattr(self.model, _MARK, self)
        try:
            self._generate, self._own = generate, self.model.__dict__.get("generate")
            plain = self.model.generate
            for layer, see in layers.items():
                self._handles.append(watch_layer(self.decoder, layer, untraced(see)))
            first = self.model.register_forward_pre_hook(untraced(before), with_kwargs=True)
            self._handles.append(first)  # at once: should the next not go on, this one goes off
            last = self.model.register_forward_hook(untraced(after), always_call=True)
            self._handles.append(last)
            self.model.generate = generate
        except BaseException:
            self.take_off()
            raise
        self.armed = True
        return plain

    def take_off(self) -> None:
        """Leave the model as it was."""
        self.armed = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(self.model, _MARK, None) is self:
            delattr(self.model, _MARK)
            if self.model.__dict__.get("generate") == self._generate:
                del self.model.generate
                if self._own is not None:
                    self.model.generate = self._own

    def check(self, of_layers: bool = False) -> None:
        """The model's hooks, or also those of its layers, are still where they were put.

        Raises:
            GuardRuntimeError: one was removed.
        """
        for handle in self._handles if of_layers else self._handles[-2:]:
            if handle.id not in (handle.hooks_dict_ref() or ()):
                raise GuardRuntimeError("the guard's hooks were removed: the output is withheld")
