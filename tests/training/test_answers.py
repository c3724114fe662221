"""Which requests are asked, how the language model answers them, and which answers are learnt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2ForCausalLM

from training import answers, pictures
from training.common import DATA, END, SYSTEM, read_jsonl
from vlm_safeguard.embedded.assemble import MODELS

TEMPLATE = MODELS["embedded"].resource("chat_template.jinja").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dog", "a dog"),
        ("red circle", "a red circle"),
        ("owl", "an owl"),
        ("glasses", "glasses"),
        ("bus", "a bus"),
        ("dress", "a dress"),
        ("tennis", "a tennis"),
    ],
)
def test_article(name: str, expected: str) -> None:
    assert answers.article(name) == expected


def test_requests_are_the_same_each_time_and_the_shortest_of_those_drawn() -> None:
    rows = answers.requests()
    assert rows == answers.requests() and len(rows) == answers.SHORTEST
    lengths = [len(row["prompt"]) for row in rows]
    assert lengths == sorted(lengths)


def test_a_request_about_a_thing_says_of_its_name_what_is_asked_beside_its_picture() -> None:
    about = [row for row in answers.requests() if row["kind"] == "about"]
    shown = {concept.name for concept in pictures.load_concepts()}
    shown |= {f"{colour} {shape}" for colour in pictures.COLOURS for shape in pictures.SHAPES}
    words = dict(answers.INSTRUCTIONS)
    assert about and {row["thing"] for row in about} <= shown
    for row in about:
        assert row["prompt"] == words[row["asked"]].format(answers.article(row["thing"]))


def test_a_general_request_keeps_its_own_words() -> None:
    general = [row for row in answers.requests() if row["kind"] == "general"]
    prompts = {row["prompt"] for row in read_jsonl(DATA / "requests.jsonl")}
    assert general and all(row["asked"] is None and row["prompt"] in prompts for row in general)


# -- answers -------------------------------------------------------------------------------------

PROMPTS = ["Is it far?", "Why is the sky blue?", "Is it near", "How old is it?", "Is it odd?"]


def greedy(llm: Qwen2ForCausalLM, tokenizer: Any, prompt: str) -> list[int]:
    """What transformers generates after the prompt in the chat template that ships."""
    message = [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "tokenize": False, "chat_template": TEMPLATE}
    ids = tokenizer(tokenizer.apply_chat_template(message, **options), return_tensors="pt")
    llm.generation_config.eos_token_id = tokenizer.eos_token_id
    out = llm.generate(**ids, max_new_tokens=answers.TOKENS, do_sample=False)
    return out[0, ids["input_ids"].shape[1] :].tolist()


def test_answers_are_those_of_greedy_generation(
    llm: Qwen2ForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "BATCH", 2)  # three prompts of one length: two batches
    told = {row["prompt"]: row for row in answers.answers(llm, tokenizer, PROMPTS)}
    assert set(told) == set(PROMPTS)
    for prompt, row in told.items():
        expected = greedy(llm, tokenizer, prompt)
        assert len(expected) == answers.TOKENS  # none of them ends by itself
        assert row["answer"] == tokenizer.decode(expected) and not row["whole"]


def test_an_answer_ends_before_its_end_token(llm: Qwen2ForCausalLM, tokenizer: Any) -> None:
    unbroken = greedy(llm, tokenizer, PROMPTS[0])
    end = unbroken[5]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    [row] = answers.answers(llm, tokenizer, PROMPTS[:1])
    told = unbroken[: unbroken.index(end)]
    assert told and row["answer"] == tokenizer.decode(told) and row["whole"]


def test_the_language_model_is_asked_in_the_template_that_ships(tokenizer: Any) -> None:
    message = [{"role": "user", "content": "Why?"}]
    options = {"add_generation_prompt": True, "tokenize": False, "chat_template": TEMPLATE}
    asked = f"{SYSTEM}<|im_start|>user\nWhy?{END}\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(message, **options) == asked


@pytest.mark.parametrize(
    ("answer", "learnt"),
    [
        ("The sky scatters blue light.", True),
        ("I'm sorry, but I can't help with that.", False),
        ("As an AI language model, I can't do that.", False),
        ("Yes, certainly.", False),
        ("", False),
        ("no no no no no no no no no no no no", False),
    ],
)
def test_refusals_and_scraps_are_not_learnt(answer: str, learnt: bool) -> None:
    assert answers.answered({"answer": answer}) is learnt


class Asked:
    """Stands in for the language model: records what it is asked, and stops after ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit, self.prompts = limit, []

    def __call__(self, model: Any, tokenizer: Any, prompts: list[str]) -> Any:
        for prompt in prompts:
            if len(self.prompts) == self.limit:
                raise KeyboardInterrupt
            self.prompts.append(prompt)
            yield {"prompt": prompt, "answer": f"It is about {prompt}", "whole": True}


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"kind": "general", "thing": None, "asked": None, "prompt": p} for p in "abcd"]
    monkeypatch.setattr(sys, "argv", ["answers", "--out", str(tmp_path)])
    monkeypatch.setattr(answers, "requests", lambda: rows)
    monkeypatch.setattr(answers, "base_model", lambda _: (None, None))
    monkeypatch.setattr(answers, "answers", Asked(limit=2))
    with pytest.raises(KeyboardInterrupt):
        answers.main()
    path = tmp_path / "embedded-float32" / answers.FILE
    assert not path.exists()
    rest = Asked(limit=4)
    monkeypatch.setattr(answers, "answers", rest)
    answers.main()
    assert rest.prompts == ["c", "d"]
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in written] == list("abcd")
    assert all(row["answer"] == f"It is about {row['prompt']}" for row in written)
