"""`python -m bench`: all measurements, the page and its JSON."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench import calibration, memory, overhead, peers, sharing, speed
from bench.guards import RANK, gate_layers
from bench.page import name_of, page
from bench.subjects import Subjects, embedded
from bench.timing import as_json
from vlm_safeguard.utils.checkout import commit
from vlm_safeguard.utils.files import write_whole

# LLaVA-1.5, asked in so many words: 24 x 24 patches; about 1.35 tokens an English word, and eight
# of the template around the question.
IMAGE, LAYERS, WORDS, TOKENS_A_WORD, TEMPLATE = 576, 32, 40, 1.35, 8
TOKENS = 25  # an even number of steps behind the first: each model goes first in half of them
# Questions and pictures of single requests; the last has about as many tokens as that LLaVA's.
SHAPES = [(1, 1), (8, 1), (24, 1), (5, 36)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    parser.add_argument("--rounds", type=int, default=15, help="of each variant")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 has a page of its own",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of every part")
    given = parser.parse_args()
    _say("loading the embedded model")
    found = {"dtype": given.dtype}
    rounds = 2 if given.quick else given.rounds
    found |= measure(embedded(given.dtype), rounds, given.quick)
    _say("memory")
    found["memory"] = memory.measured(given.quick, given.dtype)
    found = as_json(found)
    (given.output / "assets").mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    name = name_of(given.dtype)
    files = {f"assets/{name}.json": text, f"{name}.md": page(json.loads(text))}
    write_whole({given.output / place: content.encode() for place, content in files.items()})
    print(given.output / f"{name}.md")


def measure(subject: Subjects, rounds: int, quick: bool) -> dict[str, Any]:
    """Everything that the page tells, except of memory."""
    batches, tokens, pairs = ([1, 2], 4, 8) if quick else ([1, 4, 16], TOKENS, 100)
    found: dict[str, Any] = {
        "quick": quick,
        "rounds": rounds,
        "new_tokens": tokens,
        "rank": RANK,
        "pairs": pairs,
        "prompts": "harmless anchors, with a blank picture where there is one",
        "where": _where(),
        "libraries": [peers.described(name) for name in peers.LIBRARIES],
        "prediction": _prediction(subject),
        "vlm": {},
        "llm": {},
        "sharing": {},
        "overhead": {"per_layer_us": {}},
    }
    for batch in batches:
        _say(f"batch {batch}: the VLM")
        found["vlm"][batch] = speed.on_the_vlm(subject, batch, tokens, rounds)
        _say(f"batch {batch}: the language model")
        found["llm"][batch] = speed.on_the_llm(subject, batch, tokens, rounds)
        _say(f"batch {batch}: the text-only pass")
        found["sharing"][batch] = sharing.measured(subject, batch, rounds)
        _say(f"batch {batch}: the parts of a hook")
        parts = overhead.per_layer(subject.llm, batch, rounds)
        found["overhead"]["per_layer_us"][batch] = parts
    _say("one request at a time")
    shapes = SHAPES[:1] if quick else SHAPES
    found["one_by_one"] = speed.one_by_one(subject, shapes, rounds)
    _say("attaching")
    found["overhead"]["attaching_ms"] = overhead.attaching(subject.vlm, rounds)
    _say("calibration")
    found["calibration"] = calibration.measured(subject, min(rounds, 7), pairs)
    return found


def _prediction(subject: Subjects) -> list[dict[str, Any]]:
    """The text-only pass's share of a prompt's pass, where the gate is shut and where it opens."""
    words, whole = (subject.inputs(1, p)["input_ids"].shape[1] for p in (False, True))
    asked = round(WORDS * TOKENS_A_WORD) + TEMPLATE

    def row(model: str, text: int, prompt: int, depth: int) -> dict[str, Any]:
        last = max(gate_layers(range(depth), depth))
        return {
            "model": model,
            "text": text,
            "whole": prompt,
            "shut": speed.share(text, prompt, last, depth),
            "open": speed.share(text, prompt, depth - 1, depth),
        }

    return [
        row("embedded, batch 1", words, whole, subject.vlm.depth),
        row(f"LLaVA-1.5, {IMAGE} image tokens, {WORDS} words", asked, asked + IMAGE, LAYERS),
    ]


def _where() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "machine": _processor(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "commit": commit() or "unknown",
    }


def _processor() -> str:
    """The processor's name, or at least its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
