"""Installs a guard on a model and removes it, completely or not at all.

A guard wraps a model in four places: its ``forward``, its ``generate``, the method that prepares
the forward calls of every way of generating, and the output of each guarded layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.model.residual_stream import Decoder, watch_layer
from vlm_safeguard.runtime.compiling import forget_compiled, refuse_compiled, untraced

_MARK = "_vlm_safeguard_session"
_ARMING = threading.Lock()
# What every way of generating in transformers asks for before each of its forward calls.
_PREPARE = "prepare_inputs_for_generation"


class Hooks:
    """The hooks of one guard. ``generate`` and ``forward`` are the model's own."""

    generate: Callable
    forward: Callable

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self.model, self.decoder, self.armed = model, decoder, False
        self._handles: list[Any] = []
        self._replaced: dict[str, tuple[Any, Any]] = {}  # by name: ours, and what it stands for

    def put_on(
        self,
        generate: Callable,
        forward: Callable,
        check_prepared: Callable[[Mapping[str, Any]], None],
        layers: Mapping[int, Callable[[Any], Tensor | None]],
    ) -> None:
        """Put everything on.

        Args:
            generate: stands in for ``model.generate``.
            forward: stands in for ``model.forward``.
            check_prepared: is called with the keywords of each forward call that any ``generate``
                of the model prepares, and raises if it is not the one that stands in: the class's
                own, or one kept from before, cannot be replaced.
            layers: what sees the residual stream (B, T, d) after each guarded layer, in ascending
                order (see ``watch_layer``).

        ``reserve`` comes before. Whatever goes wrong, nothing stays on the model.
        """
        try:
            for layer, see in layers.items():
                self._handles.append(watch_layer(self.decoder, layer, untraced(see)))
            self.generate, self.forward = self.model.generate, self.model.forward
            self._replace("forward", _compilable_inside(forward, self.forward))
            prepare = getattr(self.model, _PREPARE)
            self._replace(_PREPARE, self._checked(prepare, check_prepared))
            self._replace("generate", generate)
            forget_compiled()
        except BaseException:
            self.take_off()
            raise
        self.armed = True

    def reserve(self) -> None:
        """Keep other guards off the model, until ``take_off``.

        Raises:
            GuardError: one is on already, or a part of the model is compiled.
        """
        with _ARMING:
            if getattr(self.model, _MARK, None) is not None:
                raise GuardError("a guard is already attached to this model: detach it first")
            refuse_compiled(self.model)
            setattr(self.model, _MARK, self)

    def take_off(self) -> None:
        """Leave the model as it was."""
        self.armed = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(self.model, _MARK, None) is self:
            delattr(self.model, _MARK)
        for name, (ours, own) in self._replaced.items():
            if self.model.__dict__.get(name) == ours:
                delattr(self.model, name)
                if own is not None:
                    setattr(self.model, name, own)
        self._replaced.clear()

    def check(self, of_layers: bool = False) -> None:
        """What prepares forward calls, and with ``of_layers`` the layers' hooks, are still there.

        Raises:
            GuardRuntimeError: one was removed or replaced.
        """
        for handle in self._handles if of_layers else ():
            if handle.id not in (handle.hooks_dict_ref() or ()):
                raise GuardRuntimeError("the guard's hooks were removed: the output is withheld")
        if self.model.__dict__.get(_PREPARE) is not self._replaced[_PREPARE][0]:
            raise GuardRuntimeError(
                f"the model's {_PREPARE} was replaced under guard (by PEFT, where an adapter adds "
                "tokens to the prompt, which is not guarded): the output is withheld. Where it was "
                "somebody else, attach the guard last"
            )

    def _replace(self, name: str, ours: Any) -> None:
        self._replaced[name] = (ours, self.model.__dict__.get(name))
        setattr(self.model, name, ours)

    def _checked(self, prepare: Callable, check: Callable[[Mapping[str, Any]], None]) -> Callable:
        @wraps(prepare)  # `generate` reads from the signature which keywords the model takes
        def checked(*args: Any, **kwargs: Any) -> Any:
            if self.armed:  # somebody may have kept it
                check(kwargs)
            return prepare(*args, **kwargs)

        return checked


def _compilable_inside(ours: Callable, own: Callable) -> Callable:
    """``ours`` in place of the model's ``own`` forward: torch.compile steps around ours and
    compiles the model's own inside it."""

    @wraps(own)  # `generate` reads from the signature which keywords the model takes
    def forward(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    return torch.compiler.disable(forward, recursive=False)
