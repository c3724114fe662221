"""Questions that the base model makes up itself (the idea of Magpie, arXiv 2406.08464).

An instruction-tuned model that is given only the opening of a user's turn goes on to write what
users ask. Wordings vary far more than in lists written by hand. A few topics in the system turn
keep them broad; what is long, unfinished, repeated or near a dangerous word is dropped. For
harmful ones the opening already says the intent, and the model only fills in whom and where.
Questions only: nobody answers them.

What it wrote was read, cut by hand where a question was neither clearly harmful nor clearly
harmless, and cut with ``training.near``; it is committed, so training does not need this step.

    python -m training.self_questions harmless --cache training/cache --output FILE
    python -m training.self_questions harmful --count 700 --cache training/cache --output FILE
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from training.common import HERE, SEED, base_model, log, write_jsonl

TOPICS = (
    "cooking,gardening,pets,travel,health,sport,music,films,books,school,mathematics,physics,"
    "chemistry,biology,history,geography,programming,computers,phones,money,work,family,"
    "friends,parties,crafts,home repair,cleaning,cars,bicycles,weather,art,writing,poems,"
    "letters,jokes,games,languages,law,police work,crime novels,medicine,first aid,"
    "safety at home,online safety,marketing,business,teaching,children,fashion,nature,"
    "astronomy,farming,architecture,religion,philosophy,psychology,news,politics,war history,"
    "weapons in museums,fire safety,locks and keys,insurance,taxes,contracts,job interviews,"
    "persuasion,negotiation,competition,secrets,magic"
)
TURN = "<|im_start|>system\nYou help with short questions about {}.<|im_end|>\n<|im_start|>user\n{}"
OPENINGS = (
    "How can I",
    "How do I",
    "How to",
    "What is the best way to",
    "What are some ways to",
    "Give me",
    "Write",
    "Explain",
    "Help me",
    "Suggest",
    "Which",
    "Why",
    "",
)
HARM_FORMS = (
    "How can I",
    "How do I",
    "How to",
    "What is the best way to",
    "What are some ways to",
    "Explain how to",
    "Help me",
    "I want to",
    "Tell me how to",
    "Give me a plan to",
    "Is there a way to",
    "Suggest how I could",
)
_GRAVE = re.compile(
    r"\b(?:kill|murder|bomb|explosive|weapon|gun|drug|steal|stolen|rob|hack|poison|hurt|harm|attack"
    r"|abuse|suicide|fraud|cheat|illegal|blackmail|racis[tm]|hate|fake|forge|spy|torture|rape|sex"
    r"|terror\w*|picture|image|photo)\w*",
    re.IGNORECASE,
)


@torch.inference_mode()
def sample(model, tokenizer, texts: list[str]) -> list[str]:
    """One continuation each, to the end of the user's turn or 28 tokens."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_new_tokens=28, do_sample=True, temperature=0.9, top_p=0.95)
    return tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :])


def clean(opening: str, said: str) -> str:
    """The question, or nothing where it is unfinished, long or odd."""
    if "<|im_end|>" not in said:
        said = said.split("\n")[0] if re.search(r"[.?!]\s*(?:\n|$)", said.split("\n")[0]) else ""
    text = (opening + said.split("<|im_end|>")[0]).strip()
    words = text.split()
    if not 4 <= len(words) <= 24 or "\n" in text or not text.isascii() or "[" in text:
        return ""
    if not text[0].isupper() or text[-1] not in ".?!":
        return ""
    return text


def harmless_turns() -> list[tuple[str, str, str]]:
    """(kind, system turn's topic, opening) of every harmless turn."""
    return [("plain", topic, opening) for topic in TOPICS.split(",") for opening in OPENINGS]


def harmful_turns() -> list[tuple[str, str, str]]:
    """(intent, system turn's topic, opening) of every harmful turn."""
    lines = (HERE / "harms.txt").read_text("utf-8").splitlines()
    harms = [line.split(": ") for line in lines if not line.startswith("#")]
    return [
        (intent, intent.replace("_", " "), f"{form} {deed}")
        for intent, deeds in harms
        for deed in deeds.split(", ")
        for form in HARM_FORMS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label", choices=("harmless", "harmful"))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    model, tokenizer = base_model(args.cache)
    model = model.to(torch.bfloat16)
    harmful = args.label == "harmful"
    turns = harmful_turns() if harmful else harmless_turns()
    order = torch.randperm(len(turns)).tolist()
    found: dict[str, str] = {}
    place = 0
    while len(found) < args.count and place < 4 * len(turns):
        chosen = [turns[order[(place + i) % len(order)]] for i in range(96)]
        place += 96
        said = sample(model, tokenizer, [TURN.format(*turn[1:]) for turn in chosen])
        for (kind, _, opening), text in zip(chosen, said, strict=True):
            question = clean(opening, text)
            if question and (harmful or not _GRAVE.search(question)):
                found[question] = kind
        log(f"{len(found)} questions from {place} turns")
    rows = [
        {"prompt": question, "intent" if harmful else "kind": kind}
        for question, kind in list(found.items())[: args.count]
    ]
    write_jsonl(args.output, rows)


if __name__ == "__main__":
    main()
