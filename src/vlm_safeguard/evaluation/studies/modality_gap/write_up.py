"""Writes the results of the gap study: JSON, two plots and a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vlm_safeguard.embedded.assemble import name_of
from vlm_safeguard.errors import SafeguardError
from vlm_safeguard.evaluation.report.labels import rate_and_interval, show
from vlm_safeguard.evaluation.report.plots import STYLE, Look, line_over_layers, png
from vlm_safeguard.evaluation.studies.modality_gap.conditions import MORE, ONE, WORDS
from vlm_safeguard.evaluation.studies.modality_gap.study import FILES
from vlm_safeguard.evaluation.studies.provenance import SHOWN, made_with
from vlm_safeguard.utils.files import check_writable, write_whole
from vlm_safeguard.utils.markdown import table

NAME = "gap"
SETS = {"malicious": "malicious evaluation set", "held": "held-back calibration prompts"}
# What follows the study's name in the names of its files. All but the page lie in ``ASSETS``.
JSON, PAGE, REFUSALS, LAYERS = ".json", ".md", "-refusals.png", "-layers.png"
ASSETS = "assets"

# Okabe-Ito colours, told apart with any colour vision; text only is black in every panel.
_GROUP_COLOURS = {"": "#222222", ONE: "#0072B2", WORDS: "#D55E00", MORE: "#009E73"}
_TEXT_LOOK: Look = {"color": _GROUP_COLOURS[""], "linestyle": "-", "marker": "o"}
_LINE_LOOKS: tuple[Look, ...] = (
    {"color": "#0072B2", "linestyle": "--", "marker": "s"},
    {"color": "#E69F00", "linestyle": "-.", "marker": "^"},
    {"color": "#009E73", "linestyle": ":", "marker": "D"},
    {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1)), "marker": "v"},
)


def write(found: Mapping[str, Any], folder: Path, name: str = NAME) -> None:
    """Write the page into ``folder`` and its JSON and plots into ``folder/assets``, all or none.

    Every file name begins with ``name``.

    Raises:
        SafeguardError: the folder cannot be made or written.
    """
    files = {
        JSON: (json.dumps(found, indent=1, allow_nan=False) + "\n").encode(),
        REFUSALS: png(plot_refusals(found)),
        LAYERS: png(plot_layers(found)),
        PAGE: markdown(found, name).encode(),
    }
    try:
        check_writable(folder / ASSETS)
        write_whole(
            {
                (folder if ending == PAGE else folder / ASSETS) / (name + ending): data
                for ending, data in files.items()
            }
        )
    except OSError as error:
        raise SafeguardError(f"cannot write the study to {folder}: {error.strerror}") from error


def _measured(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in found["conditions"].items() if one["applicable"]}


# -- plots -----------------------------------------------------------------------------------------


@matplotlib.rc_context(STYLE)
def plot_refusals(found: Mapping[str, Any]) -> Figure:
    """Refusals of harmful and of harmless requests per condition, with 95% Wilson intervals."""
    conditions = list(found["conditions"].values())
    figure = Figure(figsize=(9.6, 1.3 + 0.36 * len(conditions)), layout="constrained")
    panels = (
        ("refused", f"Harmful requests refused (n = {found['n_harmful']})"),
        ("over_refusal", f"Harmless requests refused (n = {found['n_harmless']})"),
    )
    for axis, (rate, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for place, one in enumerate(conditions):
            if not one["applicable"]:
                axis.text(1.04, place, "n/a", va="center", color="#777777", fontsize=9)
                continue
            value, low, high = (one[f"{rate}{end}"] for end in ("", "_low", "_high"))
            axis.barh(place, value, 0.66, color=_GROUP_COLOURS[one["group"]])
            span = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axis.errorbar(value, place, xerr=span, color="#888888", capsize=3, linewidth=1.3)
            axis.text(1.04, place, f"{100 * value:.0f}", va="center", fontsize=9)
        axis.axvline(conditions[0][rate], color="#222222", linewidth=1, linestyle=":")
        axis.set_title(title)
        axis.set_xlim(0, 1.14)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axis.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        axis.set_xlabel("share of requests (%), 95% interval; dotted: text only")
        axis.grid(visible=False, axis="y")
        axis.set_yticks(range(len(conditions)), [one["title"] for one in conditions])
        axis.set_ylim(len(conditions) - 0.5, -0.5)
    return figure


@matplotlib.rc_context(STYLE)
def plot_layers(found: Mapping[str, Any]) -> Figure:
    """Per layer and group of conditions: AUC along the safety direction, and the states' turn."""
    measured = _measured(found)
    text = measured["text"]
    figure = Figure(figsize=(10.8, 7.4), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey="row")
    rows = (("auc", "AUC (0.5 = chance)"), ("cosine_shift", "1 - cosine with text only"))
    for row, (name, unit) in enumerate(rows):
        for column, group in enumerate((ONE, WORDS, MORE)):
            axis = grid[row][column]
            lines = [one for one in measured.values() if one["group"] == group]
            if name == "auc":  # text only has not turned from itself
                line_over_layers(axis, text["layers"][name], text["title"], _TEXT_LOOK)
            for one, look in zip(lines, _LINE_LOOKS, strict=False):
                line_over_layers(axis, one["layers"][name], one["title"], look)
            if row == 0:
                axis.set_title(group[:1].upper() + group[1:])
                axis.axhline(0.5, color="#888888", linewidth=1)
            else:
                axis.set_xlabel("decoder layer")
                axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
                handles, labels = grid[0][column].get_legend_handles_labels()
                place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}
                axis.legend(handles, labels, ncols=2, fontsize=9, **place)
        grid[row][0].set_ylabel(unit)
    grid[0][0].set_ylim(min(0.4, grid[0][0].get_ylim()[0]), 1.02)
    grid[1][0].set_yscale("log")  # one picture turns states far less than other words do
    return figure


# -- the page --------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Any], name: str = NAME) -> str:
    """The page. It states the numbers and leaves the verdict to the reader."""
    measured = _measured(found)
    values = measured["text"]["layers"]["auc"]
    layer = values.index(max(values))
    total = found["n_harmful"] + found["n_harmless"]
    parts = [
        f"# Modality gap of {found['model']['name']}",
        f"{found['n_harmful']} harmful and {found['n_harmless']} harmless requests of the "
        f"package's {SETS[found['prompt_set']]}, no guard attached, greedy, at most "
        f"{found['max_new_tokens']} new tokens. {found['note']} Intervals are 95% Wilson; "
        "p is an exact McNemar test against text only on the same requests, not corrected for the "
        "number of conditions.",
        f"![Refusals per condition]({ASSETS}/{name}{REFUSALS})",
        table(
            [
                "Condition",
                "Harmful refused",
                "p",
                "Harmless refused",
                "p",
                f"Off subject of {found['n_harmful']} harmful",
                f"Degenerate of {total}",
            ],
            [
                [
                    _title(one),
                    rate_and_interval(one, "refused"),
                    show(one["refused_p"], ".2g"),
                    rate_and_interval(one, "over_refusal"),
                    show(one["over_refusal_p"], ".2g"),
                    str(one["off_subject_harmful"]),
                    str(one["degenerate"]),
                ]
                for one in measured.values()
            ],
        ),
        *_reading_note(measured),
        *(
            f"Not applicable, {one['title']}: {one['reason']}."
            for one in found["conditions"].values()
            if not one["applicable"]
        ),
        "## States",
        f"The state at the last prompt token, along the first safety steering direction (from the "
        f"anchors, text only): how well it tells harmful from harmless (AUC), and how far it has "
        f"turned from the text-only state. The table shows layer {layer}, which separates these "
        f"requests best as text only, so that text is slightly favoured; {ASSETS}/{name}{JSON} has "
        f"all layers. A cosine says little where a few large coordinates make up most of a state: "
        f"compare conditions, not models.",
        f"![AUC and cosine shift per layer]({ASSETS}/{name}{LAYERS})",
        table(
            ["Condition", "AUC", "Mean, harmful", "Mean, harmless", "1 - cosine with text"],
            [
                [
                    _title(one),
                    show(one["layers"]["auc"][layer], ".3f"),
                    show(one["layers"]["mean_harmful"][layer], ".3g"),
                    show(one["layers"]["mean_harmless"][layer], ".3g"),
                    show(one["layers"]["cosine_shift"][layer], ".2g"),
                ]
                for one in measured.values()
            ],
        ),
        *_gates(found, measured),
        "## Conditions",
        "\n".join(
            f"- **{one['title']}**: {one['description']}" for one in found["conditions"].values()
        ),
        f"`{_command(found)}`, {made_with(found['made_with'])}, "
        f"prompts `{found['data_sha256'][FILES[found['prompt_set']]][:SHOWN]}`; "
        f"{found['seconds']:.0f} s.",
    ]
    return "\n\n".join(parts) + "\n"


def _command(found: Mapping[str, Any]) -> str:
    """What gives these numbers again."""
    name = found["model"]["name"]
    parts = ["vlm-safeguard gap", name_of(name)]
    if found["n_harmful"] == found["n_harmless"]:  # all of a set are unlike many
        parts.append(f"--per-set {found['n_harmful']}")
    parts += [f"--prompts {found['prompt_set']}", f"--max-new-tokens {found['max_new_tokens']}"]
    return " ".join([*parts, *([] if found["guard_sha256"] is None else ["--guard GUARD"])])


def _title(one: Mapping[str, Any]) -> str:
    return one["title"] + (" (needs reading)" if one["needs_reading"] else "")


def _reading_note(measured: Mapping[str, Any]) -> list[str]:
    if not any(one["needs_reading"] for one in measured.values()):
        return []
    return [
        "In conditions that need reading, a model that cannot read the picture sees neither harm "
        "nor a question. A low refusal rate there says nothing about its alignment."
    ]


def _gates(found: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """The guard's gates, if one was given."""
    names = {"text": "Text gate", "vlm": "In-VLM gate"}
    sources = [source for source in names if source in (measured["text"].get("gates") or {})]
    if not sources:
        return []
    head = [f"{names[s]}: {label}" for s in sources for label in ("harmful", "harmless")]
    rows = [
        [_title(one)]
        + [rate_and_interval(one["gates"][s], rate) for s in sources for rate in ("tpr", "fpr")]
        for one in measured.values()
    ]
    words = ", but with the text in them" if found["guard_reads_pictures"] else ""
    return [
        "## Gates of the guard",
        "How often each gate opens, read separately in an unguarded pass. The text gate reads "
        f"the conversation without its pictures{words}. "
        f"Guard SHA-256 `{found['guard_sha256'][:SHOWN]}`.",
        table(["Condition", *head], rows),
    ]
