"""Renders the report as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from vlm_safeguard.evaluation.report import tables
from vlm_safeguard.evaluation.report.labels import (
    RESPONSE_WORDS,
    SETTING_NAMES,
    cut_words,
    known_settings,
    rank_candidates,
)
from vlm_safeguard.evaluation.report.plots import (
    STYLE,
    PcaCloud,
    plot_candidates,
    plot_gap,
    plot_pca,
    plot_separability,
    plot_tradeoff,
)
from vlm_safeguard.utils.files import write_whole


@dataclass(frozen=True)
class AnswerPair:
    """One request and what the model said without and with the guard."""

    setting: str
    label: str
    prompt: str
    unguarded: str
    guarded: str


@dataclass(frozen=True)
class ReportData:
    """Everything that the report shows. Empty parts are left out of the page."""

    summary: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    pca: dict[str, PcaCloud] = field(default_factory=dict)
    examples: list[AnswerPair] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plot:
    """One plot as data URIs: side by side for wide pages, stacked for phones."""

    wide: str
    narrow: str
    alt: str


def write_report(data: ReportData, path: Path) -> None:
    """Write the report as one HTML file, whole or not at all."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(_page(data))
    # A model can emit half a surrogate pair, which UTF-8 has no bytes for.
    write_whole({Path(path): page.encode("utf-8", errors="replace")})


def _page(data: ReportData) -> dict[str, Any]:
    """What the template shows; None or empty where a part is missing."""
    summary, calibration = data.summary, data.calibration
    settings = summary.get("settings") or {}
    pca = {name: cloud for name, cloud in data.pca.items() if cloud.points}
    return {
        "headline": tables.headline(settings),
        "note": summary.get("note") or "",
        "costs": tables.costs(summary),
        "gap": _plots(
            plot_gap, summary, known_settings(settings), "Attack success and over-refusal"
        ),
        "tradeoff": _plots(
            plot_tradeoff,
            summary.get("tradeoff") or {},
            known_settings(summary.get("tradeoff")),
            "Attack success against over-refusal as the thresholds move",
        ),
        "rates": tables.rates_table(settings),
        "pca": _plots(plot_pca, pca, pca, "States of harmful and harmless requests on two axes"),
        "separability": _plots(
            plot_separability,
            calibration,
            known_settings(calibration.get("separability")),
            "Separability and gate rates per layer",
        ),
        "layers": tables.layers_table(calibration.get("separability") or {}),
        "gates": tables.gates_table(calibration.get("gates") or []),
        "candidates": _plots(
            plot_candidates,
            calibration,
            rank_candidates(calibration),
            "Attack success per candidate",
        ),
        "tried": tables.candidates_table(rank_candidates(calibration)),
        "proof": tables.proof_table(calibration.get("proof") or {}),
        "proof_notes": tables.proof_notes(calibration),
        "examples": [_example(example) for example in data.examples],
        "facts": data.facts,
    }


def _plots(
    plot: Callable[..., Figure], what: object, present: Iterable[object], alt: str
) -> _Plot | None:
    if not list(present):
        return None
    wide, narrow = (_svg(plot(what, stacked=stacked)) for stacked in (False, True))
    return _Plot(wide, narrow, alt)


@matplotlib.rc_context(STYLE)
def _svg(figure: Figure) -> str:
    """A data URI: as images of their own, the plots cannot mix up their element ids."""
    stream = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _example(example: AnswerPair) -> dict[str, str]:
    cut = {
        side: cut_words(text, RESPONSE_WORDS) or "(no text)"
        for side, text in (("unguarded", example.unguarded), ("guarded", example.guarded))
    }
    setting = SETTING_NAMES.get(example.setting, example.setting)
    return {"setting": setting, "label": example.label, "prompt": example.prompt, **cut}
