"""The questions of easy-vqa, and a check of the answers."""

from __future__ import annotations

import re
from typing import Any

from PIL import Image

from vlm_safeguard.data.inputs import Query
from vlm_safeguard.errors import SafeguardError


def vqa_questions(count: int) -> list[tuple[Query, str]]:
    """``count`` easy-vqa test questions, evenly spread, each with its answer.

    Raises:
        SafeguardError: the easy-vqa package is not installed.
    """
    easy_vqa = _easy_vqa()
    questions, answers, images = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    count = min(count, len(questions))
    found = []
    for i in (n * len(questions) // count for n in range(count)):
        with Image.open(paths[images[i]]) as picture:
            found.append((Query(questions[i], picture.convert("RGB")), answers[i]))
    return found


def vqa_vocabulary() -> set[str]:
    """Every answer that easy-vqa knows."""
    return set(_easy_vqa().get_answers())


def _easy_vqa() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise SafeguardError(
            "easy-vqa is not installed: pip install 'vlm-safeguard[demo]'"
        ) from error
    return easy_vqa


def vqa_answer(reply: str, answer: str, vocabulary: set[str]) -> bool:
    """Whether a reply in a sentence gives ``answer``, and no other of its kind.

    A yes/no question is answered by the only yes or no in the reply; a question for a shape or a
    colour by the only word of that kind.
    """
    words = set(re.findall(r"[a-z]+", reply.lower())) & vocabulary
    shapes = {"circle", "rectangle", "triangle"}
    kinds = ({"yes", "no"}, shapes, vocabulary - shapes - {"yes", "no"})
    kind = next(k for k in kinds if answer in k)
    return words & kind == {answer}
