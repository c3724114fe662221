"""Runs the demonstration: assemble, calibrate, compare, report."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vlm_safeguard.calibration.budget import Effort
from vlm_safeguard.calibration.calibrate import calibrate
from vlm_safeguard.calibration.refusals import NOTE
from vlm_safeguard.data.inputs import requests
from vlm_safeguard.data.ocr import reader
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import evenly, spaced
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.errors import DemoError
from vlm_safeguard.evaluation import report
from vlm_safeguard.evaluation.comparison import (
    Row,
    by_benchmark,
    compare,
    own_sets,
    read_prompts,
    table,
)
from vlm_safeguard.evaluation.defenses.variants import paper_formula
from vlm_safeguard.evaluation.metrics.timing import time_ratios
from vlm_safeguard.evaluation.metrics.tradeoff import tradeoff
from vlm_safeguard.evaluation.metrics.utility import easy_vqa_accuracy, perplexity
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.model.recording import record
from vlm_safeguard.model.residual_stream import find_decoder
from vlm_safeguard.utils.files import check_writable, write_whole
from vlm_safeguard.utils.progress import Progress


@dataclass(frozen=True)
class Size:
    """How much the comparison measures."""

    per_set: int | None  # prompts of each label per evaluation set, None for all
    vqa: int
    tokens: int
    perplexity: int
    pairs: int
    effort: Effort


OUTPUTS = ("report.html", "gap.png", "tradeoff.png", "results.json", "responses.jsonl")
# A calibration that takes less time than the usual one and finds a little less.
_LESS = Effort(worded=320, pictured=120, bound=500, scan=64, search=8, final=8, tokens=8)
QUICK = Size(per_set=20, vqa=100, tokens=16, perplexity=32, pairs=7, effort=_LESS)
FULL = Size(per_set=None, vqa=2000, tokens=32, perplexity=300, pairs=25, effort=Effort())


def run_demo(
    output: Path, full: bool, extra: Sequence[Path], guard_folder: Path | None, progress: Progress
) -> dict[str, Any]:
    """Run it all; write ``report.html``, pictures and ``results.json`` to ``output``.

    Returns the summary that ``--json`` prints.

    Raises:
        DemoError: ``output`` cannot be written; found out before the work, not after.
    """
    _writable(output)
    size = FULL if full else QUICK
    if find_spec("easy_vqa") is None:
        raise DemoError("the demonstration needs easy-vqa: pip install 'vlm-safeguard[demo]'")
    given = Guard.from_pretrained(guard_folder) if guard_folder else None
    if given is None or reads_pictures(given):
        reader()  # found missing now, not after minutes
    sets = own_sets(size.per_set)
    for path in extra:
        if path.stem in sets:
            raise DemoError(f"two prompt sets are named {path.stem}: rename {path}")
        sets[path.stem] = read_prompts(path) if full else evenly(read_prompts(path), 30)
    folder = assemble(progress=progress.say)
    progress.say("loading the embedded model")
    loaded = load(folder)
    guard_folder = guard_folder or output / "guard"
    if given is None:
        for name in OUTPUTS:  # of an earlier run: they tell of another guard
            (output / name).unlink(missing_ok=True)
        made = calibrate(loaded, effort=size.effort, reads_pictures=True, progress=progress)
        made.save_pretrained(guard_folder)
    guard = given or Guard.from_pretrained(guard_folder)
    systems: dict[str, Guard | None] = {"unguarded": None, "guarded": guard}
    if full and guard.config.steering.layers:
        systems["paper"] = paper_formula(guard, alpha=1.0)
    # 64 rows: a decoding step then takes far less than two of 32.
    rows = compare(loaded, systems, sets, max_new_tokens=size.tokens, batch=64, progress=progress)
    summary: dict[str, Any] = {"settings": table(rows)}
    summary["benchmarks"] = by_benchmark(rows)
    summary["tradeoff"] = tradeoff(rows)
    summary |= _costs(loaded, guard, rows, size, progress)
    summary["note"] = NOTE
    summary["guard"] = str(guard_folder)
    summary["report"] = str(output / "report.html")
    progress.say("writing the report")
    clouds = _clouds(loaded, guard, sets["malicious"], progress)
    data = report.ReportData(
        summary=summary,
        calibration=guard.config.calibration,
        pca=clouds,
        examples=_examples(rows),
        facts=_facts(guard),
    )
    page, gap, curves, numbers, said = (output / name for name in OUTPUTS)
    report.write_report(data, page)
    report.save_png(report.plot_gap(summary), gap)
    report.save_png(report.plot_tradeoff(summary["tradeoff"]), curves)
    results = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write_whole({numbers: results.encode(), said: "".join(map(_line, rows)).encode()})
    return summary


def _writable(output: Path) -> None:
    try:
        check_writable(output)
    except OSError as error:
        raise DemoError(
            f"cannot write the report to {output}: {error.strerror}. Name another folder with -o"
        ) from error


def _costs(
    loaded: LoadedModel, guard: Guard, rows: Sequence[Row], size: Size, progress: Progress
) -> dict[str, Any]:
    """Perplexity on harmless requests, easy-vqa accuracy, time: guarded over unguarded."""
    progress.say("perplexity of the answers to harmless requests")
    values = {}
    for system in ("unguarded", "guarded"):
        chosen = [r for r in rows if r.system == system and not r.prompt.harmful]
        chosen = spaced(chosen, size.perplexity)
        items = [requests([r.prompt], "text")[0] for r in chosen]
        values[system] = perplexity(loaded, items, [r.response for r in chosen])
    plain = easy_vqa_accuracy(loaded, None, count=size.vqa, progress=progress)
    guarded = easy_vqa_accuracy(loaded, guard, count=size.vqa, progress=progress)
    progress.say("time, in pairs of guarded and unguarded runs")
    harmful = [r.prompt for r in rows if r.prompt.harmful][:16]
    timed = requests(harmful, "blank")
    per_token, first = time_ratios(loaded, guard, timed, tokens=size.tokens, pairs=size.pairs)
    return {
        "perplexity_ratio": values["guarded"] / values["unguarded"],
        "vqa_accuracy": {
            "unguarded": sum(plain) / len(plain),
            "guarded": sum(guarded) / len(guarded),
            "n": len(plain),
        },
        "time_per_token_ratio": per_token,
        "first_token_ratio": first,
    }


def _clouds(
    loaded: LoadedModel, guard: Guard, items: Sequence[Prompt], progress: Progress
) -> dict[str, report.PcaCloud]:
    """States at the last prompt token on two common axes: text, blank image, guarded.

    The layer is the last one that is steered, where all of the guard's work has been done.
    """
    layers = guard.config.steering.layers
    layer = layers[-1] if layers else guard.config.model.layers - 1
    chosen = evenly(items, 60)
    harmful = [p.harmful for p in chosen]
    with tempfile.TemporaryDirectory(prefix="vlm-safeguard-") as temporary:
        folder = Path(temporary)
        text, blank = requests(chosen, "text"), requests(chosen, "blank")
        states = {
            "text": record(loaded, text, folder, progress=progress)[:, layer].clone(),
            "blank image": record(loaded, blank, folder, progress=progress)[:, layer].clone(),
        }
        decoder = find_decoder(loaded.model)  # verified by the recordings above
        with guard.attach(loaded.model, loaded.processor):
            reads = reads_pictures(guard)
            guarded = record(
                loaded, blank, folder, decoder=decoder, read_pictures=reads, progress=progress
            )
        states["guarded, blank image"] = guarded[:, layer].clone()
    joined = torch.cat(list(states.values()))
    centre = joined.mean(0)
    _, _, axes = torch.linalg.svd(joined - centre, full_matrices=False)
    return {
        name: report.PcaCloud([(x, y) for x, y in ((part - centre) @ axes[:2].T).tolist()], harmful)
        for name, part in states.items()
    }


def _examples(rows: Sequence[Row]) -> list[report.Example]:
    """Two harmful and two harmless requests per setting, both systems side by side."""
    plain = {(r.setting, r.prompt.id): r for r in rows if r.system == "unguarded"}
    found = []
    for setting in ("text", "blank", "picture"):
        for harmful in (True, False):
            matching = [
                r
                for r in rows
                if (r.system, r.setting, r.prompt.harmful) == ("guarded", setting, harmful)
                and r.prompt.form == ("picture" if setting == "picture" else "plain")
            ]
            for row in matching[:: max(1, len(matching) // 2)][:2]:
                before = plain[setting, row.prompt.id]
                found.append(
                    report.Example(
                        setting,
                        row.prompt.label,
                        row.prompt.prompt,
                        before.response.text,
                        row.response.text,
                    )
                )
    return found


def _facts(guard: Guard) -> dict[str, str]:
    steering = guard.config.steering
    layers = f"{steering.layers[0]}-{steering.layers[-1]}" if steering.layers else "none"
    return {
        "model": guard.config.model.name,
        "steering": f"{steering.mode}, reference {steering.reference}, rank {steering.rank}, "
        f"layers {layers}, alpha {steering.alpha:g}, guarded tokens {steering.tokens or 'all'}",
        "gates": "; ".join(f"{g.source}: layers {g.layers}" for g in guard.config.gates),
        "vlm-safeguard": version("vlm-safeguard"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _line(row: Row) -> str:
    """One judged response as JSON, cut so that no answer to a harmful question is passed on."""
    said = report.cut_words(row.response.text, 12)
    facts = {
        "system": row.system,
        "setting": row.setting,
        "benchmark": row.benchmark,
        "id": row.prompt.id,
        "label": row.prompt.label,
        "verdict": row.verdict,
        "fired": row.response.fired,
        "tokens": row.response.tokens,
        "response": said,
    }
    return json.dumps(facts, ensure_ascii=False) + "\n"
