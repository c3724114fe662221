"""When two questions are the same question, and which prompts training must not have seen.

Run on a file of training prompts it drops what is too near to a calibration or evaluation prompt
of the package, or to a public benchmark where a folder is given:

    python -m training.near training/data/requests.jsonl --benchmarks FOLDER
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from training.common import log, read_jsonl, write_jsonl
from vlm_safeguard.data import prompts

STOP = frozenset(
    re.findall(
        r"\w+",
        """
        a an the to of in on at for and or is are be do does did how can could i you your my
        me it its this that with from by what which who when where way best ways good tips
        give explain write tell help want some someone would should will into about as so if
        am there any without their them they he she his her not
        """,
    )
)


def content(text: str) -> frozenset[str]:
    """Content words, plural endings cut: what makes two questions the same question."""
    words = re.findall(r"[a-z]+", text.lower())
    return frozenset(
        w[:-1] if w.endswith("s") and len(w) > 3 else w for w in words if w not in STOP
    )


def near(left: Iterable[str], right: Iterable[str], limit: float = 0.6) -> list[tuple[str, str]]:
    """Pairs whose content words overlap by ``limit`` (Jaccard) or more."""
    others = [(text, content(text)) for text in right]
    holding: dict[str, list[int]] = defaultdict(list)  # which of them hold a word
    for place, (_, words) in enumerate(others):
        for word in words:
            holding[word].append(place)
    found = []
    for text in left:
        own = content(text)
        shared = Counter(place for word in own for place in holding.get(word, ()))
        found += [
            (text, others[place][0])
            for place, count in shared.items()
            if count / (len(own) + len(others[place][1]) - count) >= limit
        ]
    return found


def spoken(prompt: prompts.Prompt) -> str:
    """A prompt with the words that stand in its picture."""
    picture = dict(prompt.picture or ())
    return prompt.prompt + (f" {picture['value']}" if picture.get("kind") == "text" else "")


def packaged() -> list[str]:
    """Every question the package calibrates or evaluates with."""
    asked = [spoken(p) for split in prompts.SPLITS for p in prompts.calibration(split)]
    # A wrapper would hide how near the question inside it is.
    asked += [row["prompt"] for row in prompts._rows("eval_jailbreak_questions.jsonl")]
    for kind in ("malicious", "picture"):
        asked += [spoken(p) for p in prompts.evaluation(kind)]  # type: ignore[arg-type]
    return asked + [text for pair in prompts.anchors() for text in (pair.harmful, pair.harmless)]


def published(folder: Path) -> list[str]:
    """The questions of the public benchmarks in ``folder``."""
    asked = (
        (folder / "malicious_instruct" / "MaliciousInstruct.txt").read_text("utf-8").splitlines()
    )
    rows = json.loads((folder / "jailbreak_instructions" / "harmful_questions.json").read_text())
    asked += [row["question"] for row in rows]
    return asked + [
        row["question"] for row in read_jsonl(folder / "mm_harmful_bench" / "questions.jsonl")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--benchmarks", type=Path)
    parser.add_argument("--limit", type=float, default=0.5)
    args = parser.parse_args()
    kept_out = packaged() + (published(args.benchmarks) if args.benchmarks else [])
    rows = read_jsonl(args.file)
    dropped = {a for a, _ in near([row["prompt"] for row in rows], kept_out, args.limit)}
    write_jsonl(args.file, [row for row in rows if row["prompt"] not in dropped])
    log(f"{len(dropped)} of {len(rows)} prompts dropped from {args.file.name}")


if __name__ == "__main__":
    main()
