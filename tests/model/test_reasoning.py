"""Reasoning before an answer: skipped where a refusal is looked for, and guarded like the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from tests import families
from tests.model.family_helpers import guard_for
from vlm_safeguard.calibration.generation import respond
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.evaluation.judges.judgement import Judgement, screened
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.reasoning import answer_of, decoded, may_reason, opened_by
from vlm_safeguard.model.refusals import judge

THOUGHT = "They ask for a lock. I'm sorry, but I can't say more of it. "


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        (f"<think>\n{THOUGHT}</think>\n\nTurn the key.", "Turn the key.", "complied"),
        ("<think>Easy.</think>I'm sorry, I can't help.", "I'm sorry, I can't help.", "refused"),
        (f"\n◁think▷{THOUGHT}◁/think▷ Turn it.", "Turn it.", "complied"),
        (f"<think>{THOUGHT}", "", "empty"),
        ("Turn it.</think> Sorry.", "Turn it.</think> Sorry.", "complied"),
        ("Well, <think>a</think>b", "Well, <think>a</think>b", "complied"),
    ],
)
def test_the_answer_is_what_follows_the_reasoning(response: str, answer: str, verdict: str) -> None:
    assert answer_of(response) == answer
    assert judge(response) == verdict


@pytest.mark.parametrize("asks", ["refusal", "harm"])
def test_a_judge_of_harm_reads_the_reasoning_too(asks: Any) -> None:
    whole, unfinished = "<think>Take the key.</think>No, I will not.", "<think>Take the key."
    seen: list[str] = []

    def ask(pairs: list[tuple[str, str]]) -> list[Judgement]:
        seen.extend(response for _, response in pairs)
        return [Judgement("refused")] * len(pairs)

    found = screened([("How?", whole), ("How?", unfinished)], ask, asks)
    if asks == "harm":
        assert seen == [whole, unfinished]
    else:
        assert seen == ["No, I will not."] and found[1].verdict == "empty"


@pytest.fixture
def loaded() -> LoadedModel:
    """A model whose tokenizer knows the tags of reasoning."""
    made = families.llava()
    tags = [AddedToken(tag, special=True) for tag in ("<think>", "</think>")]
    made.processor.tokenizer.add_tokens(tags)
    return made


def test_tags_are_kept_and_other_special_tokens_are_not(loaded: LoadedModel) -> None:
    tokenizer = loaded.processor.tokenizer
    ids = tokenizer.encode("<think>a</think>b</s>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert decoded(tokenizer, ids) == "<think>a</think>b"
    assert decoded(tokenizer, ids[1:], "<think>") == "<think>a</think>b"
    assert opened_by(tokenizer, tokenizer.encode("Hi\nassistant: <think>\n")) == "<think>"
    assert opened_by(tokenizer, tokenizer.encode("Hi\nassistant: ")) == ""
    assert may_reason(loaded.processor) and not may_reason(families.llava().processor)


@pytest.mark.parametrize("by_template", [False, True])
def test_tokens_are_counted_from_the_answer_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, by_template: bool
) -> None:
    tokenizer, begin = loaded.processor.tokenizer, "" if by_template else "<think>"
    if by_template:
        loaded.processor.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    plain = "The key turns twice." if not by_template else f"So.</think>{'x' * 40}"
    answers = [f"{begin}Let us see.</think>Turn the key.", plain, f"{begin}Hm" + "m" * 60]
    own, lengths = loaded.model.generate, []

    def generate(**options: Any) -> torch.Tensor:
        options["max_new_tokens"] = min(options["max_new_tokens"], 30)
        width = options["input_ids"].shape[1]
        told = [tokenizer.encode(a, add_special_tokens=False) + [9] * 99 for a in answers]
        out = own(
            **options,
            prefix_allowed_tokens_fn=lambda row, ids: [told[row][len(ids) - width]],
        )
        lengths.append(out.shape[1] - width)
        return out

    monkeypatch.setattr(loaded.model, "generate", generate)
    loaded.model.generation_config.suppress_tokens = None
    items = [Query("aaaa", None)] * 3
    first, second, third = respond(loaded, items, max_new_tokens=5)
    assert first.text == "<think>Let us see.</think>Turn ".strip()
    assert answer_of(first.text) == "Turn" and first.truncated
    assert answer_of(second.text) == ("xxxxx" if by_template else "The k")
    assert answer_of(third.text) == "" and third.text.startswith("<think>Hmm")
    assert lengths == [30]  # the third reasons on and on


def test_reasoning_is_guarded(loaded: LoadedModel) -> None:
    made = guard_for(families.FAMILIES["llava"], loaded, tokens=2)
    loaded.processor.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    items = [Query("Hi", families.photo(1))]
    plain, guarded = (
        respond(loaded, items, guard, max_new_tokens=4, reasoning=4)[0] for guard in (None, made)
    )
    assert guarded.fired and guarded.text != plain.text
    assert guarded.text.startswith("<think>") and guarded.tokens == 8
