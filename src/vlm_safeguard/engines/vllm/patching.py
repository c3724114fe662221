"""Puts the guard's methods in the place of vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from vlm_safeguard.errors import GuardError


def replace(owner: type | ModuleType, name: str, make: Callable[[Callable], Callable]) -> None:
    """Put what ``make`` makes of a class's own method, or of a module's function, in its place.

    Raises:
        GuardError: there is no such method or function.
    """
    if name not in vars(owner):
        raise GuardError(f"vLLM's {owner.__name__} has no {name}: this version is not supported")
    setattr(owner, name, make(vars(owner)[name]))


def refusal(kind: type[Exception], reason: str) -> Callable[[Callable], Callable]:
    """For ``replace``: what makes a method refuse every call."""

    def make(own: Callable) -> Callable:
        @wraps(own)
        def refused(*args: Any, **kwargs: Any) -> None:
            raise kind(reason)

        return refused

    return make
