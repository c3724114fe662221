"""Puts a guard's hooks on a model and takes them off again, whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

from vlm_safeguard.errors import GuardError, GuardRuntimeError
from vlm_safeguard.model.loading import Decoder, watch_layer
from vlm_safeguard.runtime.compiling import forget_compiled, refuse_compiled, untraced

_MARK = "_vlm_safeguard_session"
_ARMING = threading.Lock()
# What every way of generating in transformers asks for before each of its forward calls.
_PREPARE = "prepare_inputs_for_generation"


class Hooks:
    """The hooks of one guard: on the model, on its guarded layers, and in place of ``generate``.

    A ``generate`` that is not called by this name (the class's own, or one kept from before)
    cannot be replaced; it is met where it prepares its forward calls.
    """

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self.model, self.decoder, self.armed = model, decoder, False
        self._handles: list[Any] = []
        self._replaced: dict[str, tuple[Any, Any]] = {}  # by name: ours, and what it stands for

    def put_on(
        self,
        before: Callable,
        after: Callable,
        generate: Callable,
        preparing: Callable[[Mapping[str, Any]], None],
        entering: Callable[[], None],
        interrupted: Callable[[], None],
        layers: Mapping[int, Callable[[Any], Tensor | None]],
    ) -> Callable:
        """Put everything on; returns the model's own ``generate``.

        Args:
            before: forward pre-hook of the model, with keywords.
            after: forward hook of the model, always called.
            generate: what stands in for ``model.generate``.
            preparing: called with the keywords of each forward call that any ``generate`` of the
                model prepares; raises if it is not the one that stands in.
            entering: called where a forward call of the model begins; raises if it did not come
                past ``before``: without any hooks torch calls ``forward`` right away.
            interrupted: called where a forward call of the model ends by what is no ``Exception``,
                which ``after`` does not hear of.
            layers: what is called as the residual stream (B, T, d) after each guarded layer comes
                past, in ascending order (see ``models.watch_layer``).

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
            plain = self.model.generate
            for layer, see in layers.items():
                self._handles.append(watch_layer(self.decoder, layer, untraced(see)))
            first = self.model.register_forward_pre_hook(untraced(before), with_kwargs=True)
            self._handles.append(first)  # at once: should the next not go on, this one goes off
            last = self.model.register_forward_hook(untraced(after), always_call=True)
            self._handles.append(last)
            self._replace("forward", _watched(self.model.forward, untraced(entering), interrupted))
            self._replace(_PREPARE, self._checked(getattr(self.model, _PREPARE), preparing))
            self._replace("generate", generate)
            forget_compiled()
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
        for name, (ours, own) in self._replaced.items():
            if self.model.__dict__.get(name) == ours:
                delattr(self.model, name)
                if own is not None:
                    setattr(self.model, name, own)
        self._replaced.clear()

    def check(self, of_layers: bool = False) -> None:
        """The model's hooks, or also those of its layers, are still where they were put.

        Raises:
            GuardRuntimeError: one was removed.
        """
        for handle in self._handles if of_layers else self._handles[-2:]:
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


def _watched(forward: Callable, entering: Callable, interrupted: Callable) -> Callable:
    @wraps(forward)  # `generate` reads from the signature which keywords the model takes
    def watched(*args: Any, **kwargs: Any) -> Any:
        entering()
        try:
            return forward(*args, **kwargs)
        except Exception:
            raise
        except BaseException:
            interrupted()
            raise

    return watched
