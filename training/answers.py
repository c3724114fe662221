"""What the language model answers, as text, to the requests that the projector is trained on.

As LLaVA's visual instructions were made from captions: "Write a short poem about a dog." is
answered by the language model from the words alone; training asks "Write a short poem about what
you see." beside a picture of a dog. General requests keep their own words. So training teaches no
new content: the answers are the model's own. Requests that it refuses are left out.

    python -m training.answers --cache training/cache --out training/out
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from training import pictures as pics
from training.common import (
    DATA,
    END,
    SEED,
    SYSTEM,
    base_model,
    log,
    read_jsonl,
    stage,
    stage_parser,
    timed,
    write_jsonl,
)
from vlm_safeguard.model.refusals import judge

FILE = "answers.jsonl"
TOKENS = 28
BATCH = 64
GENERAL, ABOUT = 900, 1000  # requests drawn
SHORTEST = 1100  # of these are asked: a step of training takes as long as its prompts
PER_THING = 3
# What is asked beside the picture, and what the language model is asked about its name instead.
INSTRUCTIONS = (
    ("Tell me something about this.", "Tell me something about {}."),
    ("What can I do with this?", "What can I do with {}?"),
    ("Where would I find this?", "Where would I find {}?"),
    ("Write a short poem about what you see.", "Write a short poem about {}."),
    ("Make up a story about the thing in the picture.", "Make up a story about {}."),
    ("How would you explain this to a child?", "How would you explain {} to a child?"),
    ("Why do people like this?", "Why do people like {}?"),
    ("Suggest a title for this picture.", "Suggest a title for a picture of {}."),
    ("Give me a fact about what the image shows.", "Give me a fact about {}."),
    ("Write a caption for the photo.", "Write a caption for a photo of {}."),
    ("What does this remind you of?", "What does {} remind you of?"),
    ("How do I draw this?", "How do I draw {}?"),
    ("What should I know about this?", "What should I know about {}?"),
    ("Describe how this looks and feels.", "Describe how {} looks and feels."),
    ("How do I take care of this?", "How do I take care of {}?"),
    ("Write a message to a friend about this picture.", "Write a message to a friend about {}."),
)


def article(name: str) -> str:
    """The name as it stands in a sentence."""
    if name.endswith("s") and not name.endswith(("ss", "us", "is")):
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def requests() -> list[dict[str, Any]]:
    """General requests, and instructions about every thing that can be shown; short ones."""
    rng = random.Random(SEED)
    general = [row["prompt"] for row in read_jsonl(DATA / "requests.jsonl")]
    things = [concept.name for concept in pics.load_concepts()]
    things += [f"{colour} {shape}" for colour in pics.COLOURS for shape in pics.SHAPES]
    about = [
        {"kind": "about", "thing": thing, "asked": asked, "prompt": words.format(article(thing))}
        for thing in things
        for asked, words in rng.sample(INSTRUCTIONS, PER_THING)
    ]
    found = [
        {"kind": "general", "thing": None, "asked": None, "prompt": prompt}
        for prompt in rng.sample(general, GENERAL)
    ]
    found += rng.sample(about, ABOUT)
    return sorted(found, key=lambda row: len(row["prompt"]))[:SHORTEST]


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, prompts: list[str]) -> Iterator[dict[str, Any]]:
    """The greedy answer to each prompt, its first ``TOKENS`` tokens, and whether that is all of
    it; shortest prompts first."""
    begin = torch.tensor([tokenizer(SYSTEM + "<|im_start|>user\n").input_ids])
    prefix = DynamicCache()
    model.model(begin, past_key_values=prefix, use_cache=True)
    groups = defaultdict(list)  # prompts of one length need no padding
    for prompt in prompts:
        ids = tokenizer(f"{prompt}{END}\n<|im_start|>assistant\n").input_ids
        groups[len(ids)].append((prompt, ids))
    for length in sorted(groups):
        for start in range(0, len(groups[length]), BATCH):
            chosen = groups[length][start : start + BATCH]
            rows = _continue(model, prefix, [ids for _, ids in chosen], tokenizer.eos_token_id)
            for (prompt, _), row in zip(chosen, rows, strict=True):
                whole = tokenizer.eos_token_id in row
                kept = row[: row.index(tokenizer.eos_token_id)] if whole else row
                yield {"prompt": prompt, "answer": tokenizer.decode(kept), "whole": whole}


def _continue(model: Any, prefix: DynamicCache, rows: list[list[int]], end: int) -> list[list[int]]:
    cache = DynamicCache()
    for number, layer in enumerate(prefix.layers):
        many = (len(rows), -1, -1, -1)
        cache.update(layer.keys.expand(many), layer.values.expand(many), number)
    given, told, live = torch.tensor(rows), [], torch.ones(len(rows), dtype=torch.bool)
    while len(told) < TOKENS and live.any():
        states = model.model(given, past_key_values=cache, use_cache=True).last_hidden_state
        # A contiguous copy: torch multiplies a strided row of it far slower.
        token = model.lm_head(states[:, -1].contiguous()).argmax(-1)
        told.append(token)
        live &= token != end
        given = token[:, None]
    return torch.stack(told, 1).tolist()


def main() -> None:
    args = stage(stage_parser(__doc__))
    target, told = args.out / FILE, args.out / "answers.part.jsonl"
    rows = requests()
    known = {row["prompt"]: row for row in read_jsonl(told)} if told.exists() else {}
    todo = list({row["prompt"]: None for row in rows if row["prompt"] not in known})
    if todo:
        args.out.mkdir(parents=True, exist_ok=True)
        model, tokenizer = base_model(args)
        # A line an answer, so that an interrupted run goes on where it was.
        with told.open("a", encoding="utf-8") as part:
            for count, row in enumerate(answers(model, tokenizer, todo), 1):
                known[row["prompt"]] = row
                part.write(json.dumps(row, ensure_ascii=False) + "\n")
                part.flush()
                if count % 50 == 0 or count == len(todo):
                    log(f"answers {count}/{len(todo)}")
    write_jsonl(target, [row | known[row["prompt"]] for row in rows])
    log(f"{sum(answered(known[row['prompt']]) for row in rows)} of {len(rows)} requests answered")


def answered(row: dict[str, Any]) -> bool:
    """Whether a request got an answer to learn from: no refusal, and more than a word or two."""
    return judge(row["answer"]) == "complied" and len(row["answer"].split()) >= 3


if __name__ == "__main__":
    with timed("answers"):
        main()
