"""What the projector is trained on: sentences about pictures, and the mix of a step."""

from __future__ import annotations

import json
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

import easy_vqa
import pytest
import torch

from tests.checkpoint import byte_tokenizer
from training import pictures, projector
from training.answers import article
from training.common import END
from training.projector import Bank, Example
from vlm_safeguard.embedded.assemble import MODELS

WORDS = {*pictures.SHAPES, *pictures.COLOURS}


@pytest.fixture(scope="module")
def pictured() -> Bank:
    """The places and names of a whole bank, without features: all of easy-VQA, and emoji."""
    labels = pictures.label_shapes(*easy_vqa.get_train_questions())
    names = []
    for image in sorted(labels):
        shape, colour = labels[image]
        known = pictures.IGNORE not in (shape, colour)
        names.append(f"{pictures.COLOURS[colour]} {pictures.SHAPES[shape]}" if known else "")
    shapes = range(len(names))
    things = [concept.name for concept in pictures.load_concepts()]
    names += [things[n % len(things)] for n in range(4000)] + ["blank"] * 4
    emoji = range(len(shapes), len(shapes) + 4000)
    return Bank(torch.empty(0), names, shapes, emoji, range(emoji.stop, len(names)))


# -- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer", "rest"),
    [
        ("is there a circle?", "yes", "a circle, so yes."),
        ("is there a triangle?", "no", "not a triangle, so no."),
        ("is there not a circle?", "no", "a circle, so no."),
        ("is no triangle present?", "yes", "not a triangle, so yes."),
        ("is a red shape present?", "yes", "a red shape, so yes."),
        ("is a teal shape present?", "no", "not a teal shape, so no."),
        ("is no red shape present?", "no", "a red shape, so no."),
        ("is there not a teal shape?", "yes", "not a teal shape, so yes."),
    ],
)
def test_a_yes_or_no_comes_after_what_is_seen(question: str, answer: str, rest: str) -> None:
    sentence = f"The image shows a red circle, {rest}"
    for asked in (question, question.capitalize()):
        assert projector._sentence(asked, answer, "red circle") == sentence


@pytest.mark.parametrize(
    ("question", "answer", "sentence"),
    [
        ("what color is the circle?", "red", "The circle is red."),
        ("what is the color of the shape?", "red", "The circle is red."),
        ("what is the red shape?", "circle", "The shape is a circle."),
        ("what shape is present?", "circle", "The shape is a circle."),
    ],
)
def test_a_colour_or_a_shape_is_the_answer(question: str, answer: str, sentence: str) -> None:
    assert projector._sentence(question, answer, "red circle") == sentence


def test_every_sentence_about_easy_vqa_is_true(pictured: Bank) -> None:
    pattern = re.compile(r"The image shows a (\w+ \w+), (not )?a (\w+)( shape)?, so (yes|no)\.")
    asked = 0
    for question, answer, place in projector._vqa_questions(pictured):
        seen = pictured.name[place]
        if not seen:
            continue
        asked += 1
        sentence = projector._sentence(question, answer, seen)
        if answer not in ("yes", "no"):
            assert set(re.findall(r"\w+", sentence)) & WORDS <= set(seen.split())
            continue
        found = pattern.fullmatch(sentence)
        assert found, sentence
        shown, missing, word, _, verdict = found.groups()
        denied = bool({"not", "no"} & set(question.lower().split()))
        assert shown == seen and word in question.lower()
        assert (missing is None) == (word in seen.split())
        assert verdict == ("yes" if (missing is None) != denied else "no")
    assert asked > 30_000


def test_half_of_easy_vqa_is_typed_as_people_do(pictured: Bank) -> None:
    typed = [question[0].isupper() for question, *_ in projector._vqa_questions(pictured)]
    assert typed[:4] == [False, True, False, True]


# -- examples ------------------------------------------------------------------------------------

LEARNT = "Dogs are loyal animals."
ROWS = [
    {"kind": "general", "thing": None, "asked": None, "prompt": "Why?", "answer": "It is so."},
    {"kind": "general", "thing": None, "asked": None, "prompt": "How?"}
    | {"answer": "I'm sorry, but I can't help with that."},
    {"kind": "about", "thing": "dog", "asked": "What is this?", "prompt": "What is a dog?"}
    | {"answer": LEARNT, "whole": False},
]


@pytest.fixture(scope="module")
def pools(pictured: Bank, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Example]]:
    path: Path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    path.write_text("".join(json.dumps({"whole": True} | row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        few = tuple(column[:200] for column in easy_vqa.get_train_questions())
        patch.setattr(easy_vqa, "get_train_questions", lambda: few)
        return projector.examples(pictured, path, byte_tokenizer(), random.Random(0))


def text(tokenizer: Any, example: Example) -> tuple[str, str]:
    """The question and the answer of an example, without what surrounds them."""
    asked = tokenizer.decode(example.question).removeprefix("\n")
    return asked.removesuffix(f"{END}\n<|im_start|>assistant\n"), tokenizer.decode(example.answer)


def test_refusals_are_left_out(pools: dict[str, list[Example]], tokenizer: Any) -> None:
    assert [text(tokenizer, e)[0] for e in pools["general"]] == ["Why?"]


def test_an_instruction_stands_beside_its_thing(
    pools: dict[str, list[Example]], pictured: Bank, tokenizer: Any
) -> None:
    [example] = pools["about"]
    assert pictured.name[example.picture] == "dog"
    asked, told = text(tokenizer, example)
    assert asked == "What is this?" and LEARNT.startswith(told)


def test_only_a_whole_answer_that_fits_is_ended(
    pools: dict[str, list[Example]], tokenizer: Any
) -> None:
    [general], [about] = pools["general"], pools["about"]
    assert text(tokenizer, general)[1] == f"It is so.{END}"
    assert len(LEARNT) < projector.ANSWER_TOKENS and text(tokenizer, about)[1] == LEARNT
    for example in pools["naming"]:  # a byte is a token, so most of them are cut
        told = text(tokenizer, example)[1]
        assert len(example.answer) == projector.ANSWER_TOKENS or told.endswith(END)


def test_a_picture_is_named_as_what_it_shows(
    pools: dict[str, list[Example]], pictured: Bank, tokenizer: Any
) -> None:
    replies = dict(projector.NAMING)
    for example in pools["naming"]:
        name = pictured.name[example.picture]
        asked, told = text(tokenizer, example)
        expected = (
            "The picture is blank." if name == "blank" else replies[asked].format(article(name))
        )
        assert name and expected.startswith(told.removesuffix(END))
    assert {"blank", "dog"} <= {pictured.name[example.picture] for example in pools["naming"]}


def test_easy_vqa_is_asked_only_where_the_picture_is_known(
    pools: dict[str, list[Example]], pictured: Bank
) -> None:
    assert pools["vqa"] and all(pictured.name[example.picture] for example in pools["vqa"])


def test_training_asks_in_the_template_that_ships(
    pools: dict[str, list[Example]], tokenizer: Any
) -> None:
    model = MODELS["embedded"]
    content = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=model.resource("chat_template.jinja").read_text("utf-8"),
        add_generation_prompt=True,
        tokenize=False,
    )
    [example] = pools["general"]
    after = tokenizer.decode(example.question)
    assert whole == projector.PREFIX + model.image_token + after


# -- the mix of a step ---------------------------------------------------------------------------


def numbered(kind: str, count: int) -> list[Example]:
    return [Example([], [], place, kind) for place in range(count)]


POOL = {kind: numbered(kind, 3 * count) for kind, count in projector.STEP.items()}


def test_every_step_has_the_declared_share_of_each_kind() -> None:
    for batch in islice(projector.batches(POOL, seed=0), 7):
        kinds = [example.kind for example in batch]
        assert {kind: kinds.count(kind) for kind in POOL} == projector.STEP


def test_an_example_comes_again_only_after_all_others_of_its_kind() -> None:
    steps = list(islice(projector.batches(POOL, seed=0), 6))
    for kind, pool in POOL.items():
        drawn = [e.picture for batch in steps for e in batch if e.kind == kind]
        first, second = drawn[: len(pool)], drawn[len(pool) :]
        assert sorted(first) == sorted(second) == list(range(len(pool))) and first != second


def test_a_seed_is_an_order() -> None:
    one, same, other = (list(islice(projector.batches(POOL, seed), 3)) for seed in (0, 0, 1))
    assert one == same and one != other
