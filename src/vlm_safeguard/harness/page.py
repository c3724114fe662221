"""The results of an evaluation as a page in Markdown, for the terminal and for docs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PREFIX = "vlm-safeguard/"

NOTE = (
    "Rates with 95% Wilson intervals, clustered by question. `*` marks a defence under which "
    "significantly more attacks succeed, or more harmless prompts are refused, than with the guard "
    "on the same prompts, `-` significantly fewer (exact McNemar test, p < 0.05, per cell, not "
    "corrected for many cells). Degenerate and unscored are counts; a degenerate response is in no "
    "rate's numerator."
)
COST_NOTE = (
    "Extra passes are forward passes over the words alone, one a request. Perplexity is that of "
    "answers to harmless prompts under the bare language model. Times are relative to no defence: "
    "medians of paired runs of single requests."
)
SPEED_NOTE = (
    "Prompts per second through the harness's engine, the same prompts at batch 1 and at the batch "
    "given: medians of rounds that measure both."
)


def markdown(facts: dict[str, Any]) -> str:
    """The tables in Markdown, with what they rest on."""
    errors = facts["judge_errors"]
    parts = [
        f"Commit `{facts['made_with']['commit']}`, judge `{facts['plan']['judge']}`.",
        _success(facts["table"], corrected=bool(errors)),
        NOTE,
    ]
    if errors:
        parts.append(_errors(errors))
    for model, defences in facts["costs"].items():
        parts += ["## Cost and utility" + _of(model, facts["costs"])]
        parts += [_costs(defences, facts["easy_vqa"].get(PREFIX + model, {})), COST_NOTE]
    for model, defences in facts["throughput"].items():
        parts += ["## Prompts per second" + _of(model, facts["throughput"])]
        parts += [_speeds(defences), SPEED_NOTE]
    return "\n\n".join(parts) + "\n"


def _of(model: str, models: dict[str, Any]) -> str:
    return f" of {model}" if len(models) > 1 else ""


def _success(entries: Sequence[dict[str, Any]], corrected: bool) -> str:
    models = {entry["model"] for entry in entries}
    head = [*(["model"] if len(models) > 1 else []), "benchmark", "setting", "defence", "ASR"]
    head += [*(["ASR corrected"] if corrected else []), "over-refusal", "degenerate", "unscored"]
    rows = []
    for entry in entries:
        row = [entry["model"].removeprefix(PREFIX)] if len(models) > 1 else []
        row += [entry["benchmark"], entry["setting"], entry["defence"]]
        row.append(_interval(entry, "asr") + _mark(entry, "asr"))
        if corrected:
            row.append(entry.get("asr_not_correctable") or _interval(entry, "asr_corrected"))
        row.append(_interval(entry, "over_refusal") + _mark(entry, "over_refusal"))
        row += [str(entry["degenerate"] + entry["empty"]), str(entry["unscored"])]
        rows.append(row)
    return _table(head, rows)


def _errors(errors: dict[str, Any]) -> str:
    """What the corrected rates rest on."""
    rates = [
        f"{name} {errors[name]['value']:.1%} ({errors[name]['count']}/{errors[name]['n']})"
        for name in ("sensitivity", "specificity")
    ]
    unscored = f", {errors['unscored']} unscored" if errors["unscored"] else ""
    return (
        f"ASR corrected for the judge's errors (Rogan and Gladen) on {errors['n']} labelled "
        f"responses to harmful prompts, `{errors['labels']}`: {' and '.join(rates)}{unscored}. Its "
        "95% interval carries the uncertainty of both. It holds as far as the judge errs in every "
        "cell as it does on those responses."
    )


def _costs(defences: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """A row for each defence; columns that nothing was measured for are left out."""
    shown = {
        "extra passes": lambda name: _number(defences[name], "extra_passes", "d"),
        "perplexity": lambda name: _number(defences[name], "perplexity", ".2f"),
        "time per token": lambda name: _number(defences[name], "time_per_token_ratio", ".3f"),
        "time to first token": lambda name: _number(defences[name], "first_token_ratio", ".3f"),
        "easy-vqa accuracy": lambda name: _accuracy(accuracy.get(name)),
    }
    columns = {head: [cell(name) for name in defences] for head, cell in shown.items()}
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    rows = [list(row) for row in zip(defences, *columns.values(), strict=True)]
    return _table(["defence", *columns], rows)


def _speeds(defences: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{one['single']:.2f}",
            f"{one['batched']:.2f} (batch {one['batch']})",
            f"{one['ratio']:.2f} [{one['ratio_low']:.2f}, {one['ratio_high']:.2f}]",
            f"{one['same']}/{one['prompts']}",
        ]
        for name, one in defences.items()
    ]
    head = ["defence", "batch 1", "batched", "ratio [least, most]", "same response"]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(facts: dict[str, Any], name: str, form: str) -> str:
    return format(facts[name], form) if name in facts else ""


def _interval(entry: dict[str, Any], name: str) -> str:
    if entry.get(name) is None:
        return ""
    return _rate(entry[name], entry[f"{name}_low"], entry[f"{name}_high"])


def _accuracy(one: dict[str, Any] | None) -> str:
    return _rate(one["accuracy"], one["low"], one["high"]) if one else ""


def _rate(value: float, low: float, high: float) -> str:
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def _mark(entry: dict[str, Any], name: str) -> str:
    test = (entry.get("against_guard") or {}).get(name)
    if test is None or test["mcnemar_p"] >= 0.05:
        return ""
    return " *" if test["difference"] > 0 else " -"
