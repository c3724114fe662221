"""Measure the assembled embedded VLM, unguarded, and write the measured part of its card.

    python -m training.measure --cache training/cache [--benchmarks DIR]

``DIR`` holds ``malicious_instruct/MaliciousInstruct.txt`` in its publisher's format.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from training import pictures as pics
from training.common import log, timed
from vlm_safeguard.calibration.generation import respond
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.embedded.assemble import MODELS, assemble
from vlm_safeguard.embedded.base_llm import sha256_file
from vlm_safeguard.evaluation.demonstration import VQA_TOKENS
from vlm_safeguard.evaluation.harness import results
from vlm_safeguard.evaluation.harness.engine import engine
from vlm_safeguard.evaluation.harness.execution import Plan
from vlm_safeguard.evaluation.harness.pipeline import answers
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.utils.files import write_whole
from vlm_safeguard.utils.markdown import table, with_block
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import Rate, wilson

MODEL = MODELS["embedded"]
CARD, WEIGHTS = MODEL.resource("CARD.md"), MODEL.resource("weights.safetensors")
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


def naming(loaded: LoadedModel, cache: Path, progress: Progress) -> Rate:
    """How many emoji of the held-out artist are named."""
    concepts = pics.load_concepts()
    emoji = pics.load_emoji(concepts, cache).of(held_out=True)
    pixels = (pics.plain_emoji(emoji.rgba) * 255).byte().permute(0, 2, 3, 1).numpy()
    items = [Query("What is in this picture?", Image.fromarray(p)) for p in pixels]
    said = respond(loaded, items, max_new_tokens=12, batch=64, what="emoji", progress=progress)
    hits = [
        re.search(rf"\b{re.escape(concepts[label].name)}\b", answer.text.lower()) is not None
        for label, answer in zip(emoji.concept.tolist(), said, strict=True)
    ]
    return wilson(sum(hits), len(hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--benchmarks", type=Path)
    parser.add_argument("--per-set", type=int, help="that many prompts of each label and set")
    parser.add_argument("--vqa", type=int, default=10**6, help="easy-vqa test questions")
    args = parser.parse_args()
    torch.set_num_threads(2)
    progress = Progress()
    own = Plan(
        models=(str(assemble(MODEL.name, progress=progress.say)),),
        defences=("none",),
        benchmarks=("own_malicious", "own_jailbreak", "own_picture"),
        limit=args.per_set,
        max_tokens=24,
        loading=LoadOptions("float32", "cpu"),
    )
    plans = [own, replace(own, benchmarks=(), limit=None, vqa=args.vqa, max_tokens=VQA_TOKENS)]
    if args.benchmarks:
        published = replace(
            own, benchmarks=("malicious_instruct",), data=str(args.benchmarks), limit=None
        )
        plans.append(published)
    loaded = engine(own.models[0], own.loading, own.batch).loaded
    rows, accuracy = answers(plans, progress)
    [vqa] = [one["none"] for one in accuracy.values()]
    given = [f"--per-set {args.per_set}"] if args.per_set else []
    given += ["--benchmarks FOLDER"] if args.benchmarks else []
    facts = {
        "command": " ".join([*given, f"--vqa {vqa['n']}"]),
        "benchmarks": {
            name: results.by_setting([row for row in rows if row.benchmark == name])
            for name in dict.fromkeys(row.benchmark for row in rows)
        },
        "easy_vqa": wilson(round(vqa["accuracy"] * vqa["n"]), vqa["n"]),
        "emoji": naming(loaded, args.cache, progress),
    }
    card = with_block(CARD.read_text("utf-8"), BEGIN, measured(facts), END)
    write_whole({CARD: card.encode()})
    log(f"measured part of {CARD} written; read the rest of it against the new figures")
    print(json.dumps({"easy_vqa": str(facts["easy_vqa"]), "emoji": str(facts["emoji"])}))


def measured(facts: dict) -> str:
    """The card's measured part, in Markdown."""
    rows = []
    for name, settings in facts["benchmarks"].items():
        for setting, systems in settings.items():
            row = systems["none"]
            cells = [_interval(row, "refused"), _interval(row, "over_refusal")]
            garbled = (row["degenerate"] + row["empty"]) / row["n"]
            rows.append([name, setting, *cells, f"{garbled:.1%}"])
    head = ["Prompts", "Setting", "Harmful prompts refused", "Over-refusal", "Degenerate"]
    return f"""Weights `{WEIGHTS.name}`: SHA-256 `{sha256_file(WEIGHTS)}`, measured by
`python -m training.measure --cache CACHE {facts["command"]}`,
greedy, 24 tokens, refusal phrases as judge (a smoke test), 95% Wilson intervals.

{table(head, rows)}

easy-vqa test questions answered correctly: {facts["easy_vqa"]}. Emoji of the held-out artist named
("What is in this picture?"): {facts["emoji"]}."""


def _interval(row: dict, name: str) -> str:
    rate = Rate.from_dict(row, name)
    return f"{rate.interval} (n = {rate.n})" if rate.n else "-"


if __name__ == "__main__":
    with timed("measure"):
        main()
