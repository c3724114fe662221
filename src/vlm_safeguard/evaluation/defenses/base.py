"""What a defence is: a rewording of the request, a guard, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import Guard


def unchanged(text: str) -> str:
    """The request as it came."""
    return text


@dataclass(frozen=True)
class Defence:
    """``reword`` is applied to the text of every request; ``guard`` is attached to the model."""

    name: str
    reword: Callable[[str], str] = unchanged
    guard: Guard | None = None


def with_directions(guard: Guard, name: str) -> Guard:
    """``guard``, if it holds directions that the defence ``name`` can steer along.

    Raises:
        GuardError: it is a `defer` guard, which steers nowhere.
    """
    if not guard.config.steering.layers:
        raise GuardError(
            f"the defence {name} steers along the guard's directions, and a `defer` guard has "
            "none: leave this defence out, or calibrate a guard of another mode"
        )
    return guard
