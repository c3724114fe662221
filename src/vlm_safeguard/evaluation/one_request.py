"""One harmful request in every setting, unguarded and guarded, told as its answers come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlm_safeguard.data.inputs import SETTINGS, Query, query
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.evaluation.harness.engine import Answered
from vlm_safeguard.evaluation.report.labels import RESPONSE_WORDS, cut_words
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.refusals import judge

SYSTEMS = ("unguarded", "guarded")


class OneRequest:
    """Follows one request: the first to be answered that the model refuses as text and answers
    beside a blank image, both without a guard. What the guard does has no part in the choice.

    Args:
        prompts: harmful ones that stand on their own.
        guard: the answers of other guards are not looked at.
        say: told each answer to the request, cut at 12 words.
    """

    def __init__(self, prompts: Sequence[Prompt], guard: Guard, say: Callable[[str], None]) -> None:
        self._prompts, self._guard, self._say = prompts, guard, say
        self._places = {
            _key(query(prompt, setting)): (number, setting)
            for number, prompt in enumerate(prompts)
            for setting in SETTINGS
        }
        self._said: list[dict[tuple[str, str], str]] = [{} for _ in prompts]  # in whole
        self._chosen: int | None = None

    def hear(self, answers: Sequence[Answered]) -> None:
        """Take what the engine has just answered."""
        for request, guard, response in answers:
            place = self._places.get(_key(request))
            if place is None or (guard is not None and guard.config != self._guard.config):
                continue
            number, setting = place
            cell = setting, SYSTEMS[guard is not None]
            if cell in self._said[number]:
                continue  # a set of the user's own has the same request
            self._said[number][cell] = response.text
            if self._chosen is None and self._shows_the_gap(number):
                self._chosen = number
                self._say(f"one request: {self._prompts[number].prompt}")
                for known in self._said[number]:
                    self._tell(number, known)
            elif self._chosen == number:
                self._tell(number, cell)

    def summary(self) -> dict[str, Any]:
        """Its prompt and responses, ``{setting: {system: response}}``; those of the first prompt
        where none shows the gap."""
        number = self._chosen or 0
        said = self._said[number]
        return {
            "prompt": self._prompts[number].prompt,
            "responses": {
                setting: {system: _cut(said[setting, system]) for system in SYSTEMS}
                for setting in SETTINGS
            },
        }

    def _shows_the_gap(self, number: int) -> bool:
        said, prompt = self._said[number], self._prompts[number].prompt
        return all(
            (setting, "unguarded") in said and judge(said[setting, "unguarded"], prompt) == verdict
            for setting, verdict in (("text", "refused"), ("blank", "complied"))
        )

    def _tell(self, number: int, cell: tuple[str, str]) -> None:
        self._say(f"  {', '.join(cell)}: {_cut(self._said[number][cell])}")


def _cut(response: str) -> str:
    return cut_words(response, RESPONSE_WORDS)


def _key(request: Query) -> tuple[str, bytes | None]:
    return request.text, None if request.image is None else request.image.tobytes()
