"""The plots of the report. Each ``plot_*`` returns its own matplotlib ``Figure``."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vlm_safeguard.evaluation.report.labels import (
    MODEL_NAMES,
    SETTING_NAMES,
    candidate_name,
    finite,
    known_settings,
    rank_candidates,
)
from vlm_safeguard.utils.files import write_whole
from vlm_safeguard.utils.stats import Rate

Look = dict[str, Any]  # a line's color, linestyle and marker

TOP_CANDIDATES = 30  # rows that stay legible in one plot

# Okabe-Ito colours, told apart with any colour vision; markers and dashes repeat the difference.
_MODEL_COLOURS = {"unguarded": "#9A9A9A", "guarded": "#0072B2", "paper": "#E69F00"}
_LABEL_LOOKS = (("harmful", True, "#D55E00", "^"), ("harmless", False, "#0072B2", "o"))
_SETTING_LOOKS: dict[str, Look] = {
    "text": {"color": "#222222", "linestyle": "-", "marker": "o"},
    "blank": {"color": "#CC79A7", "linestyle": "--", "marker": "s"},
    "picture": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
}
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.hashsalt": "vlm-safeguard",  # the same data gives the same bytes
}


@dataclass(frozen=True)
class PcaCloud:
    """States of requests on two principal axes, and which requests were harmful."""

    points: list[tuple[float, float]]
    harmful: list[bool]


@matplotlib.rc_context(STYLE)
def plot_gap(summary: Mapping[str, Any], *, stacked: bool = False) -> Figure:
    """Attack success beside over-refusal, per setting, with 95% Wilson intervals."""
    settings = summary.get("settings") or {}
    names = known_settings(settings)
    models = [m for m in MODEL_NAMES if any(settings[s].get(m) for s in names)]
    figure, axes = _panels(2, stacked, wide=(9.6, 4.2), narrow=(4.4, 7.4))
    for axis, rate, title in (
        (axes[0], "asr", "Harmful requests: attacks that succeed"),
        (axes[1], "over_refusal", "Harmless requests: wrongly refused"),
    ):
        for place, model in enumerate(models):
            shift = (place - (len(models) - 1) / 2) * 0.8 / len(models)
            measured = [settings[s].get(model) or {} for s in names]
            _bars(axis, measured, rate, model, shift, 0.74 / len(models))
        axis.set_title(title, pad=10)
        axis.set_xticks(range(len(names)), [SETTING_NAMES[s] for s in names])
        axis.set_xlim(-0.55, max(len(names), 1) - 0.45)
        axis.grid(visible=False, axis="x")
        _percent_axis(axis.yaxis, axis.set_ylim, 1.08)
        axis.set_ylabel("share of requests (%), 95% interval")
    _legend(figure, axes[0])
    return figure


@matplotlib.rc_context(STYLE)
def plot_tradeoff(curves: Mapping[str, Any], *, stacked: bool = False) -> Figure:
    """Attack success against over-refusal as the gates' thresholds move, a curve per setting."""
    figure, (axis,) = _panels(1, stacked, wide=(6.4, 4.4), narrow=(4.4, 4.2))
    for name in known_settings(curves):
        look = _SETTING_LOOKS[name]
        own_mark = {"color": look["color"], "marker": look["marker"], "markersize": 8}
        points = [(p["over_refusal"], p["asr"]) for p in curves[name]]
        axis.plot(*zip(*points, strict=True), **look | {"marker": ""}, label=SETTING_NAMES[name])
        own = next(p for p in curves[name] if p["shift"] == 0)
        axis.plot(own["over_refusal"], own["asr"], **own_mark)
        axis.plot(*points[-1], **own_mark, markerfacecolor="white")
    axis.set_xlabel("harmless requests wrongly refused (%)")
    axis.set_ylabel("attacks that succeed (%)")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axis.set_xlim(-0.01, 0.31)  # nobody would take a guard that refuses more
    axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])  # room for the marks at 0
    if axis.lines:
        axis.legend()
    return figure


def _bars(
    axis: Any,
    measured: Sequence[Mapping[str, Any]],
    rate: str,
    model: str,
    shift: float,
    width: float,
) -> None:
    """The bars of one model, each with its interval and its value above."""
    colour = _MODEL_COLOURS[model]
    label: str | None = MODEL_NAMES[model]
    for place, values in enumerate(measured):
        height = finite(values.get(rate))
        if height is None:
            continue
        x = place + shift
        axis.bar(x, height, width, color=colour, label=label)
        label = None  # one entry in the legend
        low, high = (finite(values.get(f"{rate}_{end}")) for end in ("low", "high"))
        top = height
        if low is not None and high is not None:
            top = max(height, high)
            span = [[max(0.0, height - low)], [max(0.0, high - height)]]
            axis.errorbar(x, height, yerr=span, color="#222222", capsize=3, linewidth=1.2)
        axis.annotate(
            _short_percent(height),
            (x, top),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )


def _short_percent(value: float) -> str:
    """Short enough for the top of a bar; decimals only where they matter."""
    return f"{100 * value:.1f}" if 0 < value < 0.0995 else f"{math.floor(100 * value + 0.5)}"


@matplotlib.rc_context(STYLE)
def plot_pca(pca: Mapping[str, PcaCloud], *, stacked: bool = False) -> Figure:
    """One panel per cloud, all on the same two axes; large outlined markers are the means."""
    count = max(len(pca), 1)
    narrow = (4.4, 3.3 * count + 0.8)
    figure, axes = _panels(count, stacked, wide=(3.4 * count, 3.9), narrow=narrow, share=True)
    for axis, (title, cloud) in zip(axes, pca.items(), strict=False):
        for label, harmful, colour, marker in _LABEL_LOOKS:
            _cloud(axis, _points(cloud, harmful), label, colour, marker)
        axis.set_title(title[:1].upper() + title[1:])
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_locator(MaxNLocator(5))
    for axis in axes if stacked else axes[:1]:
        axis.set_ylabel("second axis (activation units)")
    for axis in axes[-1:] if stacked else axes:
        axis.set_xlabel("first axis (activation units)")
    _legend(figure, axes[0])
    return figure


def _points(cloud: PcaCloud, harmful: bool) -> list[tuple[float, float]]:
    both = zip(cloud.points, cloud.harmful, strict=True)
    return [p for p, bad in both if bad == harmful and all(map(math.isfinite, p))]


def _cloud(
    axis: Any, points: Sequence[tuple[float, float]], label: str, colour: str, marker: str
) -> None:
    if not points:
        return
    x, y = zip(*points, strict=True)
    axis.scatter(x, y, s=20, color=colour, marker=marker, alpha=0.5, linewidths=0, label=label)
    mean = (sum(x) / len(x), sum(y) / len(y))
    axis.scatter(*mean, s=110, color=colour, marker=marker, edgecolors="black", linewidths=1.4)


@matplotlib.rc_context(STYLE)
def plot_separability(calibration: Mapping[str, Any], *, stacked: bool = False) -> Figure:
    """Per layer: AUC of the safety direction, and on whom the paper's gate (b = 0) fires."""
    table = calibration.get("separability") or {}
    figure, axes = _panels(3, stacked, wide=(10.2, 3.9), narrow=(4.4, 9.6))
    panels = (
        ("auc", "Harmful against harmless", "AUC (0.5 = chance)"),
        ("tpr_b0", "Gate b = 0: harmful requests", "requests it fires on (%)"),
        ("fpr_b0", "Gate b = 0: harmless requests", "requests it fires on (%)"),
    )
    for axis, (name, title, unit) in zip(axes, panels, strict=True):
        for setting in known_settings(table):
            values = table[setting].get(name) or []
            line_over_layers(axis, values, SETTING_NAMES[setting], _SETTING_LOOKS[setting])
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.set_xlabel("decoder layer")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if name == "auc":
            axis.axhline(0.5, color="#888888", linewidth=1)
            axis.set_ylim(min(0.4, axis.get_ylim()[0]), 1.02)
        else:
            _percent_axis(axis.yaxis, axis.set_ylim, 1.04)
    _legend(figure, axes[0])
    return figure


def line_over_layers(axis: Any, values: Sequence[object], label: str, look: Look) -> None:
    """Add a line over the decoder's layers; where a value is missing it is interrupted."""
    numbers = [math.nan if (n := finite(v)) is None else n for v in values]
    axis.plot(numbers, label=label, **look, markersize=4, linewidth=1.6)


@matplotlib.rc_context(STYLE)
def plot_candidates(calibration: Mapping[str, Any], *, stacked: bool = False) -> Figure:
    """Attack success per steering candidate, best first, the chosen one marked.

    Open dots: the first round (blank image); filled dots: the finalists' second round (text, blank
    image and picture), which decided.
    """
    ranked = rank_candidates(calibration)[:TOP_CANDIDATES]
    each, width = (0.56, 4.4) if stacked else (0.33, 9.6)
    size = (width, 1.5 + each * max(len(ranked), 2))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.add_subplot()
    rounds = (
        ("asr", "n", 0.12, "white", "first round"),
        (
            "final_asr",
            "final_n",
            -0.12,
            _MODEL_COLOURS["guarded"],
            "second round (text, blank image, picture)",
        ),
    )
    for rate, n, shift, face, label in rounds:
        _dots(axis, [(c.get(rate), c.get(n)) for c in ranked], shift, face, label)
    _name_rows(axis, [candidate_name(c) for c in ranked], inside=stacked)
    axis.axhspan(-0.5, 0.45, color="#FFF1CC", zorder=0)
    axis.set_ylim(max(len(ranked), 1) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    _percent_axis(axis.xaxis, axis.set_xlim, 1.02)
    axis.set_xlim(left=-0.02)
    axis.set_xlabel("attacks that succeed (%), 95% interval")
    _legend(figure, axis, stacked=stacked)
    return figure


def _name_rows(axis: Any, names: Sequence[str], *, inside: bool) -> None:
    """Names beside the axis or, on narrow plots, above each row; the first one is bold."""
    axis.set_yticks(range(len(names)), [""] * len(names) if inside else names, fontsize=9)
    if inside:
        axis.tick_params(axis="y", length=0)
        for place, name in enumerate(names):
            weight = "normal" if place else "bold"
            axis.text(0, place - 0.35, name, va="center", fontsize=8.5, fontweight=weight)
    elif names:
        axis.get_yticklabels()[0].set_fontweight("bold")


def _dots(
    axis: Any, rates: Sequence[tuple[object, object]], shift: float, face: str, label: str | None
) -> None:
    for place, (rate, n) in enumerate(rates):
        value, size = finite(rate), int(finite(n) or 0)
        if value is None:
            continue
        blue = _MODEL_COLOURS["guarded"]
        if size > 0:
            found = Rate.of_share(value, size)
            axis.hlines(place - shift, found.low, found.high, color=blue, linewidth=1.1)
        axis.plot(
            value, place - shift, "o", markersize=6.5, mec=blue, mfc=face, label=label, zorder=3
        )
        label = None  # one entry in the legend


def _panels(
    count: int,
    stacked: bool,
    *,
    wide: tuple[float, float],
    narrow: tuple[float, float],
    share: bool = False,
) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` panels: side by side, or one over the other for a phone."""
    figure = Figure(figsize=narrow if stacked else wide, layout="constrained")
    rows, columns = (count, 1) if stacked else (1, count)
    if stacked:
        figure.set_layout_engine("constrained", h_pad=0.12)
    grid = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
    return figure, list(grid.flat)


def _percent_axis(axis: Any, set_limits: Callable[..., Any], top: float) -> None:
    """Rates all run from 0 to 100%: a cut axis would make differences look larger."""
    set_limits(0, top)
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1])
    axis.set_major_formatter(PercentFormatter(1, symbol=""))


def _legend(figure: Figure, axis: Any, *, stacked: bool = False) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = 1 if stacked else len(handles)
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=columns)
        for handle in filter(None, legend.legend_handles):
            handle.set_alpha(1)  # the dots of a cloud are see-through, its legend need not be


def png(fig: Figure) -> bytes:
    """``fig`` as the bytes of a PNG picture."""
    stream = io.BytesIO()
    fig.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    return stream.getvalue()


def save_png(fig: Figure, path: Path) -> None:
    """Write ``fig`` as a PNG file, whole or not at all."""
    write_whole({Path(path): png(fig)})
