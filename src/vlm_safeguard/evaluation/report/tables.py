"""The tables and sentences of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_safeguard.evaluation.report.labels import (
    MISSING,
    MODEL_NAMES,
    SETTING_NAMES,
    SETTING_PHRASES,
    candidate_name,
    finite,
    known_settings,
    percent,
    rate_and_interval,
    show,
)


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]


def headline(settings: Mapping[str, Any]) -> str:
    """One sentence with the numbers; it states them and leaves the verdict to the reader."""
    attacks = [
        f"{pair[1]} instead of {pair[0]} {SETTING_PHRASES[name]}"
        for name in ("blank", "picture", "text")
        if (pair := _pair(settings.get(name) or {}, "asr"))
    ]
    if not attacks:
        return "No rates with and without the guard were measured."
    text = f"Attacks that succeed with the guard: {', '.join(attacks)}"
    refused = [
        (values["guarded"]["over_refusal"], name, pair)
        for name, values in settings.items()
        if name in SETTING_PHRASES and (pair := _pair(values, "over_refusal"))
    ]
    if refused:
        _, name, pair = max(refused)
        where = f" (at worst, {SETTING_PHRASES[name]})" if len(refused) > 1 else ""
        text += f"; harmless requests refused: {pair[1]} instead of {pair[0]}{where}"
    return text + "."


def _pair(setting: Mapping[str, Any], rate: str) -> tuple[str, str] | None:
    """The rate without and with the guard, if both were measured."""
    plain, guarded = (percent((setting.get(m) or {}).get(rate)) for m in ("unguarded", "guarded"))
    return None if MISSING in (plain, guarded) else (plain, guarded)


def costs(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What else the guard changes: a name and a value each, where measured."""
    accuracy = summary.get("vqa_accuracy") or {}
    answers = " → ".join(percent(accuracy.get(m)) for m in ("unguarded", "guarded"))
    found = [
        ("accuracy on picture questions, no guard → guarded", answers if accuracy else MISSING),
        ("perplexity, guarded / no guard", show(summary.get("perplexity_ratio"), ".3f")),
        ("time per token, guarded / no guard", show(summary.get("time_per_token_ratio"), ".2f")),
        ("time to first token, guarded / no guard", show(summary.get("first_token_ratio"), ".2f")),
    ]
    return [(name, value) for name, value in found if value != MISSING]


def rates_table(settings: Mapping[str, Any]) -> Table:
    rows = [
        [
            SETTING_NAMES[name],
            MODEL_NAMES[model],
            show(values.get("n"), ".0f"),
            rate_and_interval(values, "asr"),
            rate_and_interval(values, "kept"),
            rate_and_interval(values, "over_refusal"),
            percent(values.get("off_subject_harmful")),
            percent(values.get("degenerate")),
        ]
        for name in known_settings(settings)
        for model in MODEL_NAMES
        if (values := settings[name].get(model))
    ]
    head = ["setting", "model", "n", "attacks that succeed", "refusals of text kept"]
    head += ["harmless refused", "off subject", "degenerate"]
    return Table(head, rows)


def layers_table(table: Mapping[str, Any]) -> Table:
    """Per setting, the layer that separates best and the paper's gate there."""
    rows = []
    for name in known_settings(table):
        found = [(n, i) for i, v in enumerate(table[name]["auc"]) if (n := finite(v)) is not None]
        if found:
            value, layer = max(found, key=lambda f: f[0])
            gate = [percent(table[name][rate][layer]) for rate in ("tpr_b0", "fpr_b0")]
            rows.append([SETTING_NAMES[name], str(layer), f"{value:.3f}", *gate])
    return Table(["setting", "best layer", "AUC", "b = 0: harmful", "b = 0: harmless"], rows)


def gates_table(gates: Sequence[Mapping[str, Any]]) -> Table:
    sources = {"text": "text-only pass", "vlm": "own pass"}
    rows = [
        [
            sources.get(gate["source"], str(gate["source"])),
            ", ".join(str(layer) for layer in gate["layers"]),
            SETTING_NAMES[name],
            percent(gate["tpr"].get(name)),
            percent((gate.get("fpr") or {}).get(name)),
        ]
        for gate in gates
        for name in SETTING_NAMES
        if name in (gate.get("tpr") or {})
    ]
    head = ["gate reads", "layers", "setting", "fires on harmful", "fires on harmless"]
    return Table(head, rows)


def candidates_table(ranked: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            candidate_name(c) + (" (chosen)" if place == 0 else ""),
            _with_n(c.get("asr"), c.get("n")),
            _with_n(c.get("final_asr"), c.get("final_n")),
        ]
        for place, c in enumerate(ranked)
    ]
    return Table(["steering", "first round", "second round"], rows)


def _with_n(rate: object, n: object) -> str:
    shown, size = percent(rate), show(n, ".0f")
    return shown if MISSING in (shown, size) else f"{shown} of {size}"


def proof_table(proof: Mapping[str, Any]) -> Table:
    rows = [
        [
            SETTING_NAMES[name],
            show(proof[name].get("n"), ".0f"),
            percent(proof[name].get("asr_unguarded")),
            percent(proof[name].get("asr_guarded")),
        ]
        for name in known_settings(proof)
    ]
    return Table(["setting", "attacks", "succeed, no guard", "succeed, guarded"], rows)


def proof_notes(calibration: Mapping[str, Any]) -> list[str]:
    """Sentences about the proof: harmless requests, the test, the budget, the time."""
    proof, budget = calibration.get("proof") or {}, calibration.get("budget") or {}
    harmless, notes = proof.get("harmless") or {}, []
    if harmless:
        stopped, n = (show(harmless.get(k), ".0f") for k in ("stopped", "n"))
        kl, most = (show(found.get("kl"), ".4g") for found in (harmless, budget))
        rate = percent(budget.get("false_positives"))
        notes.append(
            f"{stopped} of {n} harmless requests were stopped though the model would answer them "
            f"as text (budget {rate}); the next token's mean KL divergence there is {kl} nats "
            f"(budget {most})."
        )
    if finite(proof.get("mcnemar_p")) is not None:
        p = show(proof["mcnemar_p"], ".2g")
        notes.append(f"Attacks with images, with against without: exact McNemar test, p = {p}.")
    if finite(calibration.get("seconds")) is not None:
        notes.append(f"Calibration took {show(calibration['seconds'], '.0f')} s.")
    return notes
