"""Runs the demonstration: assemble, calibrate, compare, report."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vlm_safeguard.calibration.budget import Effort
from vlm_safeguard.calibration.calibrate import calibrate
from vlm_safeguard.data.inputs import SETTINGS, queries
from vlm_safeguard.data.ocr import check_installed
from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.data.sampling import evenly, spaced
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.errors import DemoError
from vlm_safeguard.evaluation import report
from vlm_safeguard.evaluation.benchmarks import PROMPTS, load_benchmark
from vlm_safeguard.evaluation.harness import results
from vlm_safeguard.evaluation.harness.engine import engine
from vlm_safeguard.evaluation.harness.execution import Plan
from vlm_safeguard.evaluation.harness.pipeline import answers, timed_requests
from vlm_safeguard.evaluation.harness.results import Judged
from vlm_safeguard.evaluation.metrics.likelihood import perplexity
from vlm_safeguard.evaluation.metrics.timing import time_ratios
from vlm_safeguard.evaluation.metrics.tradeoff import tradeoff
from vlm_safeguard.evaluation.one_request import OneRequest
from vlm_safeguard.evaluation.report.labels import RESPONSE_WORDS
from vlm_safeguard.guard import Guard, reads_pictures
from vlm_safeguard.model.load_options import LoadOptions
from vlm_safeguard.model.loading import LoadedModel, multiplies_bfloat16
from vlm_safeguard.model.recording import record
from vlm_safeguard.model.refusals import NOTE
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


# What the report calls the defences.
SYSTEMS = {"none": "unguarded", "guard": "guarded", "paper-formula": "paper"}
OWN = "own_"
OWN_SETS = ("own_malicious", "own_jailbreak", "own_picture")
EXTRA = 30  # prompts of a user's file, where not all are taken
BATCH = 64  # rows: a decoding step then takes far less than two of 32
VQA_TOKENS = 18
OUTPUTS = ("report.html", "gap.png", "tradeoff.png", "results.json", "responses.jsonl")
# With a calibration before it, and of a guard that is given.
QUICK = Size(per_set=12, vqa=40, tokens=16, perplexity=16, pairs=5, effort=Effort.brief())
GIVEN = replace(QUICK, per_set=20, vqa=100, perplexity=32, pairs=7)
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
    size = FULL if full else GIVEN if guard_folder else QUICK
    if find_spec("easy_vqa") is None:
        raise DemoError("the demonstration needs easy-vqa: pip install 'vlm-safeguard[demo]'")
    given = Guard.from_pretrained(guard_folder) if guard_folder else None
    if given is None or reads_pictures(given):
        check_installed()
    extra_sets = _extra_sets(extra)
    folder = assemble(progress=progress.say)
    progress.say("loading the embedded model")
    loading = LoadOptions(dtype_for(given, progress), "cpu")
    loaded = engine(str(folder), loading, BATCH).loaded
    guard_folder = guard_folder or output / "guard"
    if given is None:
        for name in OUTPUTS:  # of an earlier run: they tell of another guard
            (output / name).unlink(missing_ok=True)
        made = calibrate(loaded, effort=size.effort, reads_pictures=True, progress=progress)
        made.save_pretrained(guard_folder)
    guard = given or Guard.from_pretrained(guard_folder)
    paper = ("paper-formula",) if full and guard.config.steering.layers else ()
    own = Plan(
        models=(str(folder),),
        defences=("none", "guard", *paper),
        benchmarks=OWN_SETS,
        guard=str(guard_folder),
        limit=size.per_set,
        max_tokens=size.tokens,
        batch=BATCH,
        loading=loading,
    )
    plans = [own]
    if extra_sets:
        plans.append(replace(own, benchmarks=extra_sets, limit=None if full else EXTRA))
    questions = replace(
        own,
        defences=("none", "guard"),
        benchmarks=(),
        limit=None,
        vqa=size.vqa,
        max_tokens=VQA_TOKENS,
    )
    plain = load_benchmark(OWN_SETS[0], limit=size.per_set)
    one = OneRequest([p for p in plain if p.harmful], guard, progress.say)
    rows, accuracy = answers([*plans, questions], progress, one.hear)
    rows.sort(key=lambda row: SETTINGS.index(row.setting))
    summary: dict[str, Any] = {"settings": _table(rows)}
    summary["benchmarks"] = {
        _title(name): _table([row for row in rows if row.benchmark == name])
        for name in (*OWN_SETS, *extra_sets)
    }
    summary["tradeoff"] = tradeoff(rows)
    summary |= _costs(loaded, guard, rows, own, size, progress)
    summary["vqa_accuracy"] = _accuracy(*accuracy.values())
    summary["example"] = one.summary()
    summary["note"] = NOTE
    summary["guard"] = str(guard_folder)
    summary["report"] = str(output / "report.html")
    progress.say("writing the report")
    clouds = _clouds(loaded, guard, plain, progress)
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


def dtype_for(guard: Guard | None, progress: Progress) -> str:
    """What to compute in: bfloat16 where the processor has instructions for it, or what a guard
    was calibrated in."""
    if guard is not None:
        return guard.config.model.dtype or "float32"
    if multiplies_bfloat16():
        progress.say("computing in bfloat16")
        return "bfloat16"
    progress.say("this processor has no fast bfloat16: computing in float32, which takes longer")
    return "float32"


def _writable(output: Path) -> None:
    try:
        check_writable(output)
    except OSError as error:
        raise DemoError(
            f"cannot write the report to {output}: {error.strerror}. Name another folder with -o"
        ) from error


def _extra_sets(files: Sequence[Path]) -> tuple[str, ...]:
    """Each file of prompts as a benchmark, read once so that a bad one is found before the work."""
    found = [PROMPTS + str(path) for path in files]
    titles = [_title(name) for name in OWN_SETS]
    for name, path in zip(found, files, strict=True):
        if _title(name) in titles:
            raise DemoError(f"two prompt sets are named {_title(name)}: rename {path}")
        titles.append(_title(name))
        load_benchmark(name)
    return tuple(found)


def _title(benchmark: str) -> str:
    if benchmark.startswith(PROMPTS):
        return Path(benchmark.removeprefix(PROMPTS)).stem
    return benchmark.removeprefix(OWN)


def _table(rows: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{setting: {system: rates}}``; degenerate and empty responses together, as a share."""
    return {
        setting: {
            SYSTEMS[defence]: rates
            | {"degenerate": (rates["degenerate"] + rates["empty"]) / rates["n"]}
            for defence, rates in defences.items()
        }
        for setting, defences in results.by_setting(rows).items()
    }


def _accuracy(defences: dict[str, Any]) -> dict[str, Any]:
    """Accuracy on easy-vqa by system, and the number of its questions."""
    shares = {SYSTEMS[name]: one["accuracy"] for name, one in defences.items()}
    return shares | {"n": defences["none"]["n"]}


def _costs(
    loaded: LoadedModel,
    guard: Guard,
    rows: Sequence[Judged],
    plan: Plan,
    size: Size,
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity on harmless requests and time: guarded over unguarded."""
    progress.say("perplexity of the answers to harmless requests")
    values = {}
    for defence in ("none", "guard"):
        chosen = [r for r in rows if r.defence == defence and not r.harmful]
        chosen = spaced(chosen, size.perplexity)
        said = [r.response for r in chosen]
        values[defence] = perplexity(loaded, [r.prompt for r in chosen], said)
    progress.say("time, in pairs of guarded and unguarded runs")
    timed = timed_requests(plan)
    per_token, first = time_ratios(loaded, guard, timed, tokens=size.tokens, pairs=size.pairs)
    return {
        "perplexity_ratio": values["guard"] / values["none"],
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
        text, blank = queries(chosen, "text"), queries(chosen, "blank")
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


def _examples(rows: Sequence[Judged]) -> list[report.AnswerPair]:
    """Two harmful and two harmless requests per setting, both systems side by side."""
    plain = {(r.benchmark, r.setting, r.id): r for r in rows if r.defence == "none"}
    found = []
    for setting in SETTINGS:
        for harmful in (True, False):
            matching = [
                r
                for r in rows
                if (r.defence, r.setting, r.harmful) == ("guard", setting, harmful)
                and r.benchmark != "own_jailbreak"
                and (r.benchmark == "own_picture") == (setting == "picture")
            ]
            for row in matching[:: max(1, len(matching) // 2)][:2]:
                before = plain[row.benchmark, setting, row.id].response
                found.append(
                    report.AnswerPair(setting, row.label, row.prompt, before, row.response)
                )
    return found


def _facts(guard: Guard) -> dict[str, str]:
    steering = guard.config.steering
    layers = f"{steering.layers[0]}-{steering.layers[-1]}" if steering.layers else "none"
    return {
        "model": guard.config.model.name,
        "steering": f"{steering.mode}, reference {steering.reference}, rank {steering.rank}, "
        f"layers {layers}, alpha {steering.alpha:g}, guarded tokens {steering.tokens or 'all'}"
        + (", later ones as in a refusal" if steering.later == "refusal" else ""),
        "gates": "; ".join(f"{g.source}: layers {g.layers}" for g in guard.config.gates),
        "vlm-safeguard": version("vlm-safeguard"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _line(row: Judged) -> str:
    """One judged response as JSON, cut so that no answer to a harmful question is passed on."""
    facts = {
        "system": SYSTEMS[row.defence],
        "setting": row.setting,
        "benchmark": _title(row.benchmark),
        "id": row.id,
        "label": row.label,
        "verdict": row.verdict,
        "fired": row.fired,
        "tokens": row.tokens,
        "response": report.cut_words(row.response, RESPONSE_WORDS),
    }
    return json.dumps(facts, ensure_ascii=False) + "\n"
