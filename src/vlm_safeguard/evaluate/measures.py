"""Cost and utility: perplexity, easy-vqa accuracy, paired time ratios."""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from PIL import Image

from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluate.generate import Response, respond
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.models import LoadedModel, encode, find_decoder
from vlm_safeguard.pictures import draw_text
from vlm_safeguard.progress import Progress
from vlm_safeguard.reading import reader
from vlm_safeguard.requests import Request

_Time = TypeVar("_Time")

# A guard that reads pictures is timed on one with words in it, which it has not seen before.
WORDS_TO_READ = "Please tell me how to water the plants in the garden"


@torch.inference_mode()
def perplexity(loaded: LoadedModel, items: Sequence[Request], answers: Sequence[Response]) -> float:
    """Perplexity of responses under the unguarded LLM, given their prompts as text.

    Over all response tokens together; empty responses contribute none.

    Raises:
        SafeguardError: no response holds a token.
    """
    tokenizer = loaded.processor.tokenizer
    decoder, head = find_decoder(loaded.model).module, loaded.model.get_output_embeddings()
    total, count = 0.0, 0
    for item, answer in zip(items, answers, strict=True):
        said = tokenizer(answer.text, add_special_tokens=False, return_tensors="pt").input_ids
        if said.shape[1] == 0:
            continue
        said = said.to(loaded.device)
        prompt = encode(loaded, [item.text], [None])["input_ids"]
        states = decoder(input_ids=torch.cat([prompt, said], 1), use_cache=False)[0]
        logits = head(states[:, prompt.shape[1] - 1 : -1]).float()
        total += torch.nn.functional.cross_entropy(logits[0], said[0], reduction="sum").item()
        count += said.shape[1]
    if not count:
        raise SafeguardError("no response holds a token, so there is no perplexity")
    return float(torch.tensor(total / count).exp())


def vqa_questions(count: int) -> list[tuple[Request, str]]:
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
            found.append((Request(questions[i], picture.convert("RGB")), answers[i]))
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


def easy_vqa_accuracy(
    loaded: LoadedModel,
    guard: Guard | None,
    *,
    count: int,
    progress: Progress | None = None,
) -> list[bool]:
    """Whether each of ``count`` easy-vqa test questions is answered correctly.

    Raises:
        SafeguardError: the easy-vqa package is not installed.
    """
    asked = vqa_questions(count)
    items = [item for item, _ in asked]
    replies = respond(
        loaded, items, guard, max_new_tokens=14, batch=64, what="easy-vqa", progress=progress
    )
    vocabulary = vqa_vocabulary()
    return [
        vqa_answer(reply.text, answer, vocabulary)
        for reply, (_, answer) in zip(replies, asked, strict=True)
    ]


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


def time_ratios(
    loaded: LoadedModel,
    guard: Guard | None,
    items: Sequence[Request],
    *,
    reword: Callable[[str], str] = str,
    tokens: int = 24,
    pairs: int = 9,
) -> tuple[float, float]:
    """(time per token, time to first token) defended / not: medians of paired runs.

    The defended side has ``guard`` attached, if there is one, and its text passed through
    ``reword``.

    Each pair times both on the same request, in alternating order, single requests. Decoding
    always runs ``tokens`` tokens, so that both do the same work.
    """

    def work(item: Request, defended: bool) -> tuple[float, float]:
        own = guard if defended else None
        text = reword(item.text) if defended else item.text
        inputs = encode(loaded, [text], [item.image], reads_pictures(own))
        with own.attach(loaded.model, loaded.processor) if own else nullcontext():
            return _timed(loaded, inputs, tokens)

    runs = _in_pairs(work, items, pairs)
    first = statistics.median(one[0] / plain[0] for plain, one in runs)
    return statistics.median(one[1] / plain[1] for plain, one in runs), first


def request_ratio(
    loaded: LoadedModel,
    guard: Guard | None,
    items: Sequence[Request],
    *,
    reword: Callable[[str], str] = str,
    tokens: int = 24,
    pairs: int = 9,
) -> float:
    """Time of a whole request, defended / not: the median of paired runs, as in ``time_ratios``.

    From text and picture to the last of ``tokens`` tokens, preprocessing included. Where the guard
    reads pictures, so is reading one: both sides get a picture of words that was never read.

    Raises:
        SafeguardError: the guard reads pictures and the OCR library is missing.
    """
    reads = reads_pictures(guard)
    words = draw_text(WORDS_TO_READ) if reads else None
    if reads:
        reader()  # its models are loaded once per process, not per request

    def work(item: Request, defended: bool) -> float:
        own = guard if defended else None
        if reads:
            reader().forget()
        with own.attach(loaded.model, loaded.processor) if own else nullcontext():
            begin = time.perf_counter()
            text = reword(item.text) if defended else item.text
            picture = item.image if words is None else words
            inputs = encode(loaded, [text], [picture], reads_pictures(own))
            _generate(loaded, inputs, tokens)
            return time.perf_counter() - begin

    return statistics.median(one / plain for plain, one in _in_pairs(work, items, pairs))


def _in_pairs(
    work: Callable[[Request, bool], _Time], items: Sequence[Request], pairs: int
) -> list[tuple[_Time, _Time]]:
    """``work`` on each of ``pairs`` requests, not defended and defended, in alternating order."""
    found = []
    for n in range(pairs):
        order = (False, True) if n % 2 else (True, False)
        times = {defended: work(items[n % len(items)], defended) for defended in order}
        found.append((times[False], times[True]))
    return found


def _timed(
    loaded: LoadedModel, inputs: dict[str, torch.Tensor], tokens: int
) -> tuple[float, float]:
    """Seconds to the first token, and per token after it: the median, so that a step in which the
    machine did something else does not count."""
    marks: list[float] = []

    class Clock:
        def put(self, _: torch.Tensor) -> None:
            marks.append(time.perf_counter())

        def end(self) -> None: ...

    begin = time.perf_counter()
    _generate(loaded, inputs, tokens, streamer=Clock())
    # The streamer is given the prompt first, then each token.
    steps = [late - early for early, late in itertools.pairwise(marks[1:])]
    return marks[1] - begin, statistics.median(steps)


def _generate(
    loaded: LoadedModel, inputs: dict[str, torch.Tensor], tokens: int, **options: Any
) -> None:
    """Decode exactly ``tokens`` tokens, greedily."""
    loaded.model.generate(
        **inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, **options
    )
