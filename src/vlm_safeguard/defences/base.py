"""What a defence is: a rewording of the request, a guard, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlm_safeguard.errors import DataError, GuardError
from vlm_safeguard.guard import Guard
from vlm_safeguard.prompts import SLOT


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


def template(text: str, file: Path | None) -> Callable[[str], str]:
    """A rewording that puts the request at ``[QUESTION]`` in ``text``, or in the text of ``file``.

    Raises:
        DataError: the file cannot be read or does not hold ``[QUESTION]`` exactly once.
    """
    if file is not None:
        try:
            text = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the defence's text {file}: {error}") from error
        if text.count(SLOT) != 1:
            raise DataError(f"{file} must hold {SLOT} exactly once: the request goes in there")
    before, after = text.split(SLOT)
    return lambda request: before + request + after
