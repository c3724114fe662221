"""Instructions about a picture, answered by the language model from the picture's name alone.

As LLaVA's visual instructions were made from captions: "Write a short poem about a dog." is
answered by the model as it was published, from text only; visual tuning asks "Write a short poem
about this." with a picture of a dog. So visual tuning sees many kinds of answer, not names only.

    python -m training.picture_answers --cache training/cache --out training/out
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from training import pictures as pics
from training.common import SEED, base_model, fast_dtype, log, read_jsonl, write_jsonl
from training.self_answers import answer

FILE = "picture_answers.jsonl"
PER_THING = 3
# What is asked with the picture, and what the language model is asked about its name instead.
ASKED = (
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


def questions() -> list[dict[str, str]]:
    """Which instructions are asked of which thing, and how in words alone."""
    rng = random.Random(SEED)
    things = [concept.name for concept in pics.load_concepts()]
    things += [f"{colour} {shape}" for colour in pics.COLOURS for shape in pics.SHAPES]
    return [
        {"thing": thing, "asked": asked, "prompt": words.format(article(thing))}
        for thing in things
        for asked, words in rng.sample(ASKED, PER_THING)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    target = args.out / FILE
    rows = questions()
    known = {r["prompt"]: r["answer"] for r in read_jsonl(target)} if target.exists() else {}
    todo = [r["prompt"] for r in rows if r["prompt"] not in known]
    torch.set_num_threads(2)
    if todo:
        model, tokenizer = base_model(args.cache)
        known |= dict(zip(todo, answer(model.to(fast_dtype()), tokenizer, todo), strict=True))
    kept = [r | {"answer": known[r["prompt"]]} for r in rows]
    kept = [r for r in kept if len(r["answer"].split()) >= 3]
    write_jsonl(target, kept)
    log(f"{len(kept)} answers about pictures")


if __name__ == "__main__":
    main()
