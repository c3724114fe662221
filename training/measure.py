"""Measure the assembled embedded VLM, unguarded, and write the measured part of its card.

    python -m training.measure --cache training/cache [--model NAME] [--benchmarks DIR]

``DIR`` holds ``malicious_instruct/MaliciousInstruct.txt`` in its publisher's format. ``--answers``
writes answers to be labelled by hand, ``--labels`` takes the threshold of what is on the subject
from such labels (see ``training.subject``).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from training import shown
from training.common import add_model, log, timed
from training.shown import TOKENS, Seen
from training.subject import (
    PLAIN,
    answers_of,
    informed,
    on_subject,
    rates,
    read_labels,
    threshold_text,
    with_subject,
    write_answers,
)
from vlm_safeguard.calibration.generation import respond
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.embedded.assemble import MODELS, PROJECTOR, TOWER, assemble
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

SHAPES, EMOJI = "easy-vqa", "emoji"  # kinds of pictures beside instructions
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


def naming(loaded: LoadedModel, seen: Sequence[Seen], progress: Progress) -> Rate:
    """How many of the pictures are named."""
    items = [Query("What is in this picture?", one.image) for one in seen]
    said = respond(loaded, items, max_new_tokens=12, batch=64, what="emoji", progress=progress)
    hits = [
        re.search(rf"\b{re.escape(one.name)}\b", answer.text.lower()) is not None
        for one, answer in zip(seen, said, strict=True)
    ]
    return wilson(sum(hits), len(hits))


def main() -> None:
    args = _arguments()
    labels = read_labels(args.labels) if args.labels else None
    threshold = labels.threshold if labels else 0.0
    torch.set_num_threads(2)
    progress = Progress()
    plans = _plans(args, str(assemble(args.model, progress=progress.say)))
    loaded = engine(plans[0].models[0], plans[0].loading, plans[0].batch).loaded
    rows, accuracy = answers(plans, progress)
    [vqa] = [one["none"] for one in accuracy.values()]
    emoji = shown.emoji(args.cache)
    found = answers_of(rows)
    for kind, seen in ((SHAPES, shown.shapes()), (EMOJI, emoji)):
        found += shown.asked_about(loaded, kind, seen, progress)
    found = informed(loaded, found, progress)
    if args.answers:
        write_answers(args.answers, found)
    rows = with_subject(rows, found, threshold)
    facts = {
        "command": _command(args, vqa["n"]),
        "dtype": args.dtype,
        "weights": [MODELS[args.model].resource(name) for name in (PROJECTOR, TOWER)],
        "benchmarks": {
            name: results.by_setting([row for row in rows if row.benchmark == name])
            for name in dict.fromkeys(row.benchmark for row in rows)
        },
        "easy_vqa": wilson(round(vqa["accuracy"] * vqa["n"]), vqa["n"]),
        "emoji": naming(loaded, emoji, progress),
        "on_subject": rates([one for one in found if one.source in PLAIN], threshold),
        "shown": {
            kind: on_subject([one for one in found if one.source == kind], threshold)
            for kind in (SHAPES, EMOJI)
        },
        "threshold": threshold_text(labels),
    }
    path = MODELS[args.model].resource("CARD.md")
    card = with_block(path.read_text("utf-8"), BEGIN, measured(facts), END)
    write_whole({path: card.encode()})
    log(f"measured part of {path} written; read the rest of it against the new figures")
    print(json.dumps(told(facts)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--benchmarks", type=Path)
    parser.add_argument("--per-set", type=int, help="that many prompts of each label and set")
    parser.add_argument("--vqa", type=int, default=10**6, help="easy-vqa test questions")
    parser.add_argument("--answers", type=Path, help="where to write answers, to be labelled")
    parser.add_argument("--labels", type=Path, help="such answers with labels")
    return parser.parse_args()


def _plans(args: argparse.Namespace, model: str) -> list[Plan]:
    own = Plan(
        models=(model,),
        defences=("none",),
        benchmarks=("own_malicious", "own_jailbreak", "own_picture"),
        limit=args.per_set,
        max_tokens=TOKENS,
        loading=LoadOptions(args.dtype, "cpu"),
    )
    plans = [own, replace(own, benchmarks=(), limit=None, vqa=args.vqa, max_tokens=VQA_TOKENS)]
    if args.benchmarks:
        published = replace(
            own, benchmarks=("malicious_instruct",), data=str(args.benchmarks), limit=None
        )
        plans.append(published)
    return plans


def _command(args: argparse.Namespace, questions: int) -> str:
    given = [] if args.model == "embedded" else [f"--model {args.model}"]
    given += [] if args.dtype == "float32" else [f"--dtype {args.dtype}"]
    given += [f"--per-set {args.per_set}"] if args.per_set else []
    given += ["--benchmarks FOLDER"] if args.benchmarks else []
    given += ["--labels FILE"] if args.labels else []
    return " ".join([*given, f"--vqa {questions}"])


def told(facts: dict) -> dict:
    """The rates that are printed, as text."""
    return {
        "easy_vqa": str(facts["easy_vqa"]),
        "emoji": str(facts["emoji"]),
        "on_subject": {
            f"{source}, {setting}": {label: str(rate) for label, rate in by_label.items() if rate.n}
            for (source, setting), by_label in facts["on_subject"].items()
        },
        "shown": {kind: str(rate) for kind, rate in facts["shown"].items()},
    }


def measured(facts: dict) -> str:
    """The card's measured part, in Markdown."""
    rows = []
    for name, settings in facts["benchmarks"].items():
        for setting, systems in settings.items():
            row = systems["none"]
            cells = [_interval(Rate.from_dict(row, rate)) for rate in ("refused", "over_refusal")]
            off = Rate.from_dict(row, "off_subject_harmful").value
            garbled = (row["degenerate"] + row["empty"]) / row["n"]
            rows.append([name, setting, *cells, f"{off:.1%}", f"{garbled:.1%}"])
    head = ["Prompts", "Setting", "Harmful prompts refused", "Over-refusal"]
    head += ["Off subject, harmful", "Degenerate"]
    on = [
        [source, setting, *(_interval(by_label[label]) for label in ("harmful", "harmless"))]
        for (source, setting), by_label in facts["on_subject"].items()
    ]
    files = [f"`{path.name}`, SHA-256 `{sha256_file(path)}`" for path in facts["weights"]]
    weights = ";\n".join(files)
    return f"""{weights}.
Measured by `python -m training.measure --cache CACHE {facts["command"]}`,
in {facts["dtype"]}, greedy, {TOKENS} tokens, refusal phrases as judge (a smoke test), 95% Wilson
intervals.

{table(head, rows)}

easy-vqa test questions answered correctly: {facts["easy_vqa"]}. Emoji of the held-out artist named
("What is in this picture?"): {facts["emoji"]}.

Of the responses that are no refusal, on the subject of their request:

{table(["Prompts", "Setting", "Harmful", "Harmless"], on)}

An answer on the subject does more than repeat the request, and is
{facts["threshold"]}.
The others are off the subject above. In sets that are not listed, those that repeat the request
are.

Instructions about what is shown, in words that training does not have, answered about it (refused
ones count against it): beside easy-vqa test pictures {facts["shown"][SHAPES]}, beside emoji of the
held-out artist {facts["shown"][EMOJI]}."""


def _interval(rate: Rate) -> str:
    return f"{rate.interval} (n = {rate.n})" if rate.n else "-"


if __name__ == "__main__":
    with timed("measure"):
        main()
