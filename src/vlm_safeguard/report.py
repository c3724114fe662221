"""The evaluation report: its plots, and one HTML file that needs nothing else.

The functions ``plot_*`` return a matplotlib ``Figure`` of their own and leave pyplot alone;
``write_report`` puts them with the tables and examples on a page.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vlm_safeguard.evaluate.stats import wilson
from vlm_safeguard.files import write_whole

SETTING_NAMES = {"text": "text only", "blank": "blank image", "picture": "picture"}
SETTING_PHRASES = {
    "text": "as text only",
    "blank": "with a blank image",
    "picture": "with a picture",
}
MODEL_NAMES = {"unguarded": "no guard", "guarded": "guarded", "paper": "paper's formula"}
RESPONSE_WORDS = 12
TOP_CANDIDATES = 30  # rows that stay legible in one plot
MISSING = "–"

# Okabe-Ito colours, told apart with any colour vision; markers and dashes repeat the difference.
_MODEL_COLOURS = {"unguarded": "#9A9A9A", "guarded": "#0072B2", "paper": "#E69F00"}
_LABEL_LOOKS = (("harmful", True, "#D55E00", "^"), ("harmless", False, "#0072B2", "o"))
_SETTING_LOOKS = {
    "text": ("#222222", "-", "o"),
    "blank": ("#CC79A7", "--", "s"),
    "picture": ("#009E73", "-.", "^"),
}
_STYLE = {
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


@dataclass(frozen=True)
class Example:
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
    examples: list[Example] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class _Plot:
    """One plot as data URIs: side by side for wide pages, stacked for phones."""

    wide: str
    narrow: str
    alt: str


# -- words and numbers --------------------------------------------------------------------------


def cut_words(text: str, count: int) -> str:
    """The first ``count`` words of ``text``, with an ellipsis where something was left off.

    Scripts without spaces have no words to count: there, ``12 * count`` characters are the limit.
    """
    words = text.split()
    cut = " ".join(words[:count])
    shorter = cut[: 12 * count]
    left_off = len(words) > count or len(shorter) < len(cut)
    return shorter.rstrip() + (" …" if left_off else "")


def _number(value: object) -> float | None:
    """``value`` if it is a finite number: NaN in the data must not reach the page."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _percent(value: object) -> str:
    number = _number(value)
    return MISSING if number is None else f"{number:.1%}"


def _show(value: object, form: str) -> str:
    number = _number(value)
    return MISSING if number is None else format(number, form)


def _rate(measured: Mapping[str, Any], name: str) -> str:
    """A rate with its interval."""
    low, high = _number(measured.get(f"{name}_low")), _number(measured.get(f"{name}_high"))
    rate = _percent(measured.get(name))
    if rate == MISSING or low is None or high is None:
        return rate
    return f"{rate} ({100 * low:.1f}–{100 * high:.1f})"


def _known(found: Mapping[str, Any] | None) -> list[str]:
    """The settings that ``found`` has, in the order of the paper."""
    return [name for name in SETTING_NAMES if (found or {}).get(name)]


# -- plots --------------------------------------------------------------------------------------


@matplotlib.rc_context(_STYLE)
def plot_gap(summary: Mapping[str, Any], *, stacked: bool = False) -> Figure:
    """Attack success beside over-refusal, per setting, with 95% Wilson intervals."""
    settings = summary.get("settings") or {}
    names = _known(settings)
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
        height = _number(values.get(rate))
        if height is None:
            continue
        x = place + shift
        axis.bar(x, height, width, color=colour, label=label)
        label = None  # one entry in the legend
        low, high = (_number(values.get(f"{rate}_{end}")) for end in ("low", "high"))
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


@matplotlib.rc_context(_STYLE)
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


@matplotlib.rc_context(_STYLE)
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
        for setting in _known(table):
            _layers(axis, table[setting].get(name) or [], setting)
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


def _layers(axis: Any, values: Sequence[object], setting: str) -> None:
    colour, dashes, marker = _SETTING_LOOKS[setting]
    numbers = [math.nan if (n := _number(v)) is None else n for v in values]
    axis.plot(
        range(len(numbers)),
        numbers,
        color=colour,
        linestyle=dashes,
        marker=marker,
        markersize=4,
        linewidth=1.6,
        label=SETTING_NAMES[setting],
    )


@matplotlib.rc_context(_STYLE)
def plot_candidates(calibration: Mapping[str, Any], *, stacked: bool = False) -> Figure:
    """Attack success per steering candidate, best first, the chosen one marked.

    Open dots: the first round (blank image); filled dots: the finalists' second round (text, blank
    image and picture), which decided.
    """
    ranked = _ranked(calibration)[:TOP_CANDIDATES]
    each, width = (0.56, 4.4) if stacked else (0.33, 9.6)
    figure = _figure((width, 1.5 + each * max(len(ranked), 2)))
    axis = figure.add_subplot()
    rounds = (
        ("asr_blank", "n", 0.12, "white", "first round"),
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
    _name_rows(axis, [_candidate_name(c) for c in ranked], inside=stacked)
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


def _ranked(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Candidates, the chosen one first: the second round decides, then the first one."""
    tried = [c for c in calibration.get("candidates") or [] if _first_round(c) < math.inf]
    return sorted(tried, key=lambda c: (not c.get("chosen"), _second_round(c), _first_round(c)))


def _first_round(candidate: Mapping[str, Any]) -> float:
    rate = _number(candidate.get("asr_blank"))
    return math.inf if rate is None else rate


def _second_round(candidate: Mapping[str, Any]) -> float:
    rate = _number(candidate.get("final_asr"))
    return math.inf if rate is None else rate


def _candidate_name(candidate: Mapping[str, Any]) -> str:
    """What tells this candidate from the others."""
    steering = candidate["steering"]
    if steering.get("mode") == "defer":
        return "defer to the text-only pass"
    if steering.get("mode") == "add":
        kind = f"add α={steering.get('alpha', 0):g}, {steering.get('query')} query"
    else:
        kind = f"{steering.get('mode')} to {steering.get('reference')}"
    if steering.get("positions") == "all":
        kind += ", all positions"
    tokens = steering.get("tokens")
    dose = "all tokens" if tokens is None else f"{tokens} token{'s' if tokens != 1 else ''}"
    return f"{kind}, layers {steering.get('layers')}, rank {steering.get('rank')}, {dose}"


def _dots(
    axis: Any, rates: Sequence[tuple[object, object]], shift: float, face: str, label: str | None
) -> None:
    for place, (rate, n) in enumerate(rates):
        value, size = _number(rate), int(_number(n) or 0)
        if value is None:
            continue
        blue = _MODEL_COLOURS["guarded"]
        if size > 0:
            interval = wilson(round(value * size), size)
            axis.hlines(place - shift, interval.low, interval.high, color=blue, linewidth=1.1)
        axis.plot(
            value, place - shift, "o", markersize=6.5, mec=blue, mfc=face, label=label, zorder=3
        )
        label = None  # one entry in the legend


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panels(
    count: int,
    stacked: bool,
    *,
    wide: tuple[float, float],
    narrow: tuple[float, float],
    share: bool = False,
) -> tuple[Figure, list[Any]]:
    """A figure of ``count`` panels: side by side, or one over the other for a phone."""
    figure = _figure(narrow if stacked else wide)
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


# -- files --------------------------------------------------------------------------------------


def save_png(fig: Figure, path: Path) -> None:
    """Write ``fig`` as a PNG file, whole or not at all."""
    stream = io.BytesIO()
    fig.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    write_whole({Path(path): stream.getvalue()})


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


# -- the page -----------------------------------------------------------------------------------


def _page(data: ReportData) -> dict[str, Any]:
    """What the template shows; None or empty where a part is missing."""
    summary, calibration = data.summary, data.calibration
    settings = summary.get("settings") or {}
    pca = {name: cloud for name, cloud in data.pca.items() if cloud.points}
    return {
        "headline": _headline(settings),
        "note": summary.get("note") or "",
        "costs": _costs(summary),
        "gap": _plots(plot_gap, summary, _known(settings), "Attack success and over-refusal"),
        "rates": _rates_table(settings),
        "pca": _plots(plot_pca, pca, pca, "States of harmful and harmless requests on two axes"),
        "separability": _plots(
            plot_separability,
            calibration,
            _known(calibration.get("separability")),
            "Separability and gate rates per layer",
        ),
        "layers": _layers_table(calibration.get("separability") or {}),
        "gates": _gates_table(calibration.get("gates") or []),
        "candidates": _plots(
            plot_candidates, calibration, _ranked(calibration), "Attack success per candidate"
        ),
        "tried": _candidates_table(_ranked(calibration)),
        "proof": _proof_table(calibration.get("proof") or {}),
        "proof_notes": _proof_notes(calibration),
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


@matplotlib.rc_context(_STYLE)
def _svg(figure: Figure) -> str:
    """A data URI: as images of their own, the plots cannot mix up their element ids."""
    stream = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _headline(settings: Mapping[str, Any]) -> str:
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
    plain, guarded = (_percent((setting.get(m) or {}).get(rate)) for m in ("unguarded", "guarded"))
    return None if MISSING in (plain, guarded) else (plain, guarded)


def _costs(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What else the guard changes: a name and a value each, where measured."""
    accuracy = summary.get("vqa_accuracy") or {}
    answers = " → ".join(_percent(accuracy.get(m)) for m in ("unguarded", "guarded"))
    costs = [
        ("accuracy on picture questions, no guard → guarded", answers if accuracy else MISSING),
        ("perplexity, guarded / no guard", _show(summary.get("perplexity_ratio"), ".3f")),
        ("time per token, guarded / no guard", _show(summary.get("time_per_token_ratio"), ".2f")),
        ("time to first token, guarded / no guard", _show(summary.get("first_token_ratio"), ".2f")),
    ]
    return [(name, value) for name, value in costs if value != MISSING]


def _rates_table(settings: Mapping[str, Any]) -> _Table:
    rows = [
        [
            SETTING_NAMES[name],
            MODEL_NAMES[model],
            _show(values.get("n"), ".0f"),
            _rate(values, "asr"),
            _rate(values, "over_refusal"),
            _percent(values.get("degenerate")),
        ]
        for name in _known(settings)
        for model in MODEL_NAMES
        if (values := settings[name].get(model))
    ]
    head = ["setting", "model", "n", "attacks that succeed", "harmless refused", "degenerate"]
    return _Table(head, rows)


def _layers_table(table: Mapping[str, Any]) -> _Table:
    """Per setting, the layer that separates best and the paper's gate there."""
    rows = []
    for name in _known(table):
        found = [(n, i) for i, v in enumerate(table[name]["auc"]) if (n := _number(v)) is not None]
        if found:
            value, layer = max(found, key=lambda f: f[0])
            gate = [_percent(table[name][rate][layer]) for rate in ("tpr_b0", "fpr_b0")]
            rows.append([SETTING_NAMES[name], str(layer), f"{value:.3f}", *gate])
    return _Table(["setting", "best layer", "AUC", "b = 0: harmful", "b = 0: harmless"], rows)


def _gates_table(gates: Sequence[Mapping[str, Any]]) -> _Table:
    sources = {"text": "text-only pass", "vlm": "own pass"}
    rows = [
        [
            sources.get(gate["source"], str(gate["source"])),
            ", ".join(str(layer) for layer in gate["layers"]),
            SETTING_NAMES[name],
            _percent(gate["tpr"].get(name)),
            _percent((gate.get("fpr") or {}).get(name)),
        ]
        for gate in gates
        for name in SETTING_NAMES
        if name in (gate.get("tpr") or {})
    ]
    head = ["gate reads", "layers", "setting", "fires on harmful", "fires on harmless"]
    return _Table(head, rows)


def _candidates_table(ranked: Sequence[Mapping[str, Any]]) -> _Table:
    rows = [
        [
            _candidate_name(c) + (" (chosen)" if place == 0 else ""),
            _with_n(c.get("asr_blank"), c.get("n")),
            _with_n(c.get("final_asr"), c.get("final_n")),
        ]
        for place, c in enumerate(ranked)
    ]
    return _Table(["steering", "first round", "second round"], rows)


def _with_n(rate: object, n: object) -> str:
    shown, size = _percent(rate), _show(n, ".0f")
    return shown if MISSING in (shown, size) else f"{shown} of {size}"


def _proof_table(proof: Mapping[str, Any]) -> _Table:
    rows = [
        [
            SETTING_NAMES[name],
            _show(proof[name].get("n"), ".0f"),
            _percent(proof[name].get("asr_unguarded")),
            _percent(proof[name].get("asr_guarded")),
        ]
        for name in _known(proof)
    ]
    return _Table(["setting", "attacks", "succeed, no guard", "succeed, guarded"], rows)


def _proof_notes(calibration: Mapping[str, Any]) -> list[str]:
    """Sentences about the proof: harmless requests, the test, the budget, the time."""
    proof, budget = calibration.get("proof") or {}, calibration.get("budget") or {}
    harmless, notes = proof.get("harmless") or {}, []
    if harmless:
        fired, n = (_show(harmless.get(k), ".0f") for k in ("fired", "n"))
        kl, rate = _show(harmless.get("kl"), ".4g"), _percent(budget.get("false_positives"))
        notes.append(
            f"The gate fired on {fired} of {n} harmless requests (budget {rate}); the next token's "
            f"mean KL divergence there is {kl} nats (budget {_show(budget.get('kl'), '.4g')})."
        )
    if _number(proof.get("mcnemar_p")) is not None:
        p = _show(proof["mcnemar_p"], ".2g")
        notes.append(f"Attacks with images, with against without: exact McNemar test, p = {p}.")
    if _number(calibration.get("seconds")) is not None:
        notes.append(f"Calibration took {_show(calibration['seconds'], '.0f')} s.")
    return notes


def _example(example: Example) -> dict[str, str]:
    cut = {
        side: cut_words(text, RESPONSE_WORDS) or "(no text)"
        for side, text in (("unguarded", example.unguarded), ("guarded", example.guarded))
    }
    setting = SETTING_NAMES.get(example.setting, example.setting)
    return {"setting": setting, "label": example.label, "prompt": example.prompt, **cut}
