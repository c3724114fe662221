"""The plots of the playground, as SVG for a page.

Colours are CSS variables of the page (``--ink``, ``--harmful``, ``--harmless``), so that a plot
follows its light or dark theme. Each plot is narrow enough for a phone.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlm_safeguard.artifact.config import Gate
from vlm_safeguard.playground.anchors import AnchorMap
from vlm_safeguard.playground.answers import Decided
from vlm_safeguard.playground.wording import gate_title
from vlm_safeguard.runtime.attestation import Decision

# Okabe-Ito colours, told apart with any colour vision; markers repeat the difference.
_INK, _HARMFUL, _HARMLESS = "#222222", "#d55e00", "#0072b2"
_VARIABLES = {_INK: "var(--ink)", _HARMFUL: "var(--harmful)", _HARMLESS: "var(--harmless)"}
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "legend.frameon": False,
    "svg.hashsalt": "vlm-safeguard",  # the same data gives the same bytes
}
_WIDTH = 4.1  # inches: letters stay legible on a phone
_CLOUDS = (("harmful anchors", _HARMFUL, "^"), ("harmless anchors", _HARMLESS, "o"))


@dataclass(frozen=True)
class Bar:
    """A row of the plot of scores. ``decides``: the gate opens if this score is above 0; other rows
    are what a layer adds to it."""

    label: str
    score: float
    decides: bool


def bars(gates: Sequence[Gate], decision: Decision) -> list[Bar]:
    """The rows of every gate: its score and, if it reads several layers, each layer's part."""
    rows = []
    for index, gate in enumerate(gates):
        added = decision.parts.get(f"{gate.source}.{index}", [])
        names = [f"layer {layer}" for layer in gate.layers] + ["refusal signs"]
        if not gate.per_layer:
            added = _without_offsets(gate, added)
        parts = [
            (name, score)
            for name, score in zip(names, added, strict=False)
            if math.isfinite(score)  # NaN: the layer was not read
        ]
        if gate.per_layer:
            rows += [Bar(f"{gate_title(gate)}: {name}", score, True) for name, score in parts]
        elif parts:
            rows.append(Bar(gate_title(gate), sum(score for _, score in parts), True))
            rows += [Bar(name, score, False) for name, score in parts if len(parts) > 1]
    return rows


def _without_offsets(gate: Gate, parts: Sequence[float]) -> list[float]:
    """The parts of a sum with its threshold shared out evenly among the layers: a guard's file may
    hold all of it in one layer, which then would seem to say no."""
    share = sum(gate.thresholds) / len(gate.layers)
    even = [part + own - share for part, own in zip(parts, gate.thresholds, strict=False)]
    return even + list(parts[len(gate.layers) :])


@matplotlib.rc_context(_STYLE)
def plot_scores(gates: Sequence[Gate], decision: Decision) -> str:
    """Scores against their threshold, which is subtracted: a gate opens above 0."""
    rows = bars(gates, decision)
    figure = Figure(figsize=(_WIDTH, 1.0 + 0.52 * max(len(rows), 1)), layout="constrained")
    axis = figure.add_subplot()
    for place, row in enumerate(rows):
        colour = _HARMFUL if row.score > 0 else _HARMLESS
        height, alpha = (0.36, 1.0) if row.decides else (0.2, 0.5)
        axis.barh(place, row.score, height, color=colour, alpha=alpha)
        # The threshold, beside the bar alone: a line through all rows would cross their labels.
        axis.vlines(0, place - height / 2 - 0.05, place + height / 2 + 0.05, _INK, linewidth=1.5)
        state = f": {'open' if row.score > 0 else 'shut'}" if row.decides else ""
        axis.annotate(
            f"{row.label}  {row.score:+.2f}{state}",
            (0, place - height / 2 - 0.08),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontweight="bold" if row.decides else "normal",
            fontsize=8.5,
        )
    reach = 1.15 * max([abs(row.score) for row in rows] + [1e-6])
    axis.set_xlim(-reach, reach)
    axis.set_ylim(max(len(rows), 1) - 0.6, -0.75)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("shut  ←  score minus threshold  →  open")
    return _svg(figure)


@matplotlib.rc_context(_STYLE)
def plot_map(anchors: AnchorMap, verdict: Decided | None) -> str:
    """The anchors on two principal axes, and where a request falls: with its picture and, if the
    guard read it so, as text."""
    figure = Figure(figsize=(_WIDTH, 3.9), layout="constrained")
    axis = figure.add_subplot()
    for (label, colour, marker), points in zip(_CLOUDS, anchors.points.tolist(), strict=True):
        x, y = zip(*points, strict=True)
        axis.scatter(x, y, s=16, color=colour, marker=marker, alpha=0.55, linewidths=0, label=label)
    if verdict is not None:
        _mark(axis, anchors, verdict)
    first, second = anchors.shares
    axis.set_xlabel(f"first axis ({first:.0%} of the variance)")
    axis.set_ylabel(f"second axis ({second:.0%})")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    figure.legend(loc="outside upper left", ncols=2, fontsize=8.5)
    return _svg(figure)


def _mark(axis: Any, anchors: AnchorMap, verdict: Decided) -> None:
    end = anchors.place(verdict.as_asked)
    name = "this request"
    if verdict.as_text is not None:
        begin, name = anchors.place(verdict.as_text), "this request, with its picture"
        axis.plot(*zip(begin, end, strict=True), ":", color=_INK, linewidth=1.2)
        axis.scatter(
            *begin, s=60, facecolor="none", edgecolor=_INK, marker="D", label="the same as text"
        )
    axis.scatter(*end, s=170, color=_INK, marker="*", label=name, zorder=3)


def _svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element that takes the width it is given."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text
