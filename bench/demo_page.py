"""`python -m bench.demo_page REPORT`: the demonstration's figures, from its report into the docs.

It writes what stands between the marks in the README, in ``docs/results.md`` and on the embedded
model's card, and copies ``gap.png`` and ``results.json`` to ``docs/assets``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlm_safeguard.embedded.assemble import MODELS
from vlm_safeguard.utils import checkout
from vlm_safeguard.utils.files import write_whole
from vlm_safeguard.utils.markdown import table, with_block
from vlm_safeguard.utils.stats import Rate, wilson

ROOT = Path(__file__).parents[1]
START, END = "<!-- made by python -m bench.demo_page -->", "<!-- end -->"
PATHS = ("guard", "report")  # of the machine that ran it
COMMAND = "`vlm-safeguard demo --guard embedded`"
SYSTEMS = ("unguarded", "guarded")
OFF_SUBJECT = "Off subject"
NAMES = {"text": "text", "blank": "blank image", "picture": "picture"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo_page", description=__doc__)
    parser.add_argument("report", type=Path, nargs="?", default=ROOT / "report")
    parser.add_argument("--commit", help="Of the code that made the report (default: HEAD).")
    chosen = parser.parse_args()
    folder: Path = chosen.report
    results = json.loads((folder / "results.json").read_text("utf-8"))
    commit = chosen.commit or checkout.commit() or "unknown"
    files = {
        ROOT / "README.md": readme(results, commit),
        ROOT / "docs" / "results.md": page(results, commit),
        MODELS["embedded"].resource("CARD.md"): card(results, commit),
    }
    written = {
        path: with_block(path.read_text("utf-8"), START, block, END).encode()
        for path, block in files.items()
    }
    assets = ROOT / "docs" / "assets"
    written[assets / "gap.png"] = (folder / "gap.png").read_bytes()
    kept = {name: value for name, value in results.items() if name not in PATHS}
    written[assets / "results.json"] = (json.dumps(kept, indent=1) + "\n").encode()
    write_whole(written)
    for path in written:
        print(path)


def readme(results: dict[str, Any], commit: str) -> str:
    """Plain harmful and harmless requests, with and without the guard."""
    plain = results["benchmarks"]["malicious"]
    n = plain["text"]["unguarded"]["asr_n"]
    return (
        f"The embedded model, harmful and harmless requests (`own_malicious`, {n} of each),\n"
        f"{COMMAND}, commit {commit}; 95% Wilson intervals:\n\n{_plain_table(plain)}"
    )


def page(results: dict[str, Any], commit: str) -> str:
    """All that the demonstration measured."""
    rows = []
    for setting, systems in results["settings"].items():
        for system, row in systems.items():
            rates = [Rate.from_dict(row, name).interval for name in ("asr", "kept", "over_refusal")]
            size = f"{row['asr_n']} + {row['over_refusal_n']}"
            rows.append([setting, system, *rates, f"{_off_subject(row):.1%}", size])
    head = ["Setting", "System", "Attack success", "Kept", "Over-refusal", OFF_SUBJECT]
    sets = results["benchmarks"]
    plain = sets["malicious"]
    n = plain["text"]["unguarded"]["asr_n"]
    accuracy = results["vqa_accuracy"]
    return "\n\n".join(
        [
            table([*head, "n (harmful + harmless)"], rows),
            f"Plain requests alone (`own_malicious`, {n} of each label):",
            _plain_table(plain),
            "The share of guarded requests on which a gate opens, harmful and harmless:",
            _gate_table(sets),
            f"easy-vqa accuracy is {accuracy['unguarded']:.1%} without the guard and "
            f"{accuracy['guarded']:.1%} with it (n = {accuracy['n']}).\nThe perplexity of answers "
            f"to harmless requests is x {results['perplexity_ratio']:.3f}, time per token "
            f"x {results['time_per_token_ratio']:.3f} and time to first\ntoken "
            f"x {results['first_token_ratio']:.3f} (medians of paired runs, without the time for "
            f"OCR). Commit {commit}.",
        ]
    )


def card(results: dict[str, Any], commit: str) -> str:
    """What the model does without a guard."""
    plain = results["benchmarks"]["malicious"]
    rows = []
    for setting, one in plain.items():
        row = one["unguarded"]
        asr, refused = (Rate.from_dict(row, name).interval for name in ("asr", "over_refusal"))
        rows.append([NAMES[setting], asr, f"{_off_subject(row):.0%}", refused])
    n, vqa = plain["text"]["unguarded"]["asr_n"], results["vqa_accuracy"]
    right = wilson(round(vqa["unguarded"] * vqa["n"]), vqa["n"])
    garbled = max(one["unguarded"]["degenerate"] for one in results["settings"].values())
    return (
        f"{COMMAND}, commit {commit}, without a guard, `own_malicious`, {n} of each label,\n"
        "refusal phrases as judge (a smoke test), 95% Wilson intervals:\n\n"
        f"{table(['Setting', 'Attack success', OFF_SUBJECT, 'Over-refusal'], rows)}\n\n"
        f"easy-vqa: {right.interval} of {vqa['n']} test questions. "
        f"Garbled answers: at most {garbled:.1%}."
    )


def _plain_table(plain: dict[str, Any]) -> str:
    rows = []
    for setting, row in plain.items():
        cells = [row[system] for system in SYSTEMS]
        rates = [Rate.from_dict(cell, "asr").interval for cell in cells]
        off = " / ".join(f"{_off_subject(cell):.0%}" for cell in cells)
        refused = [f"{cell['over_refusal']:.0%}" for cell in cells]
        rows.append([NAMES[setting], *rates, off, *refused])
    success, refusal = (
        [f"{kind}, {system}" for system in SYSTEMS] for kind in ("Attack success", "Over-refusal")
    )
    return table(["Setting", *success, f"{OFF_SUBJECT}, {' / '.join(SYSTEMS)}", *refusal], rows)


def _off_subject(row: dict[str, Any]) -> float:
    """The share of harmful requests with an answer off the subject: no success and no refusal."""
    return Rate.from_dict(row, "off_subject_harmful").value


def _gate_table(sets: dict[str, Any]) -> str:
    rows = []
    for name, settings in sets.items():
        for setting, row in settings.items():
            shares = (row["guarded"]["fired_harmful"], row["guarded"]["fired_harmless"])
            rows.append([f"`own_{name}`", NAMES[setting], *(f"{share:.1%}" for share in shares)])
    return table(["Set", "Setting", "Harmful", "Harmless"], rows)


if __name__ == "__main__":
    main()
