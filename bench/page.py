"""Writes the benchmark's results as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vlm_safeguard.utils import markdown

table = partial(markdown.table, numbers=True)


def figure(one: Mapping[str, float] | None, digits: int = 3) -> str:
    """Median and quartiles; a dash where nothing was measured."""
    if one is None:
        return "–"
    median, low, high = (f"{one[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def page(found: Mapping[str, Any]) -> str:
    """The whole page, from the contents of its JSON."""
    sections = [
        _opening(found),
        _vlm(found["vlm"]),
        _prediction(found["prediction"]),
        _one_by_one(found["one_by_one"]),
        _sharing(found["sharing"]),
        _peers(found),
        _overhead(found["overhead"]),
        _rest(found),
    ]
    return "\n\n".join(sections) + "\n"


def name_of(dtype: str) -> str:
    """The name of the page's file and of its JSON's, without what comes behind the dot."""
    return "bench" if dtype == "float32" else f"bench-{dtype}"


def _opening(found: Mapping[str, Any]) -> str:
    where = found["where"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    how = "--quick" if found["quick"] else f"--rounds {found['rounds']}"
    how += "" if found["dtype"] == "float32" else f" --dtype {found['dtype']}"
    command = f"OMP_NUM_THREADS={where['threads']} python -m bench {how}"
    quick = "\n\n**A smoke test (`--quick`): the figures mean nothing.**" if found["quick"] else ""
    return f"""# What a guard costs

`{command}`, in the environment that
`make bench` makes, wrote this page and [its data](assets/{name_of(found["dtype"])}.json): the
embedded model, {found["dtype"]}, {where["machine"]} ({versions}), commit {where["commit"]}.{quick}

- Every figure is the median, with quartiles, of {found["rounds"]} rounds. In each round every
  variant runs once, in random order, in one process.
- Times are ratios of paired calls. A model with hooks and its twin without hooks share the same
  weights and `generate` for the same request in lockstep, token by token. They take turns in going
  first.
- *Unguarded again* has no hooks on either model and shows the noise.
- Guards are made by hand, with gates forced open or shut and with as many directions as the largest
  candidate of a calibration.
- Prompts: {found["prompts"]}.
- Each call generates {found["new_tokens"]} tokens. The time per token is the median step's."""


def _vlm(batches: Mapping[str, Any]) -> str:
    parts = ["## On the VLM"]
    for batch, found in batches.items():
        base, tokens = found["unguarded"], found["tokens"]
        parts.append(
            f"Batch {batch}: {tokens['whole']} prompt tokens in each row, {tokens['text']} of them "
            f"text; unguarded {figure(base['first_s'])} s to the first token, "
            f"{figure(base['per_token_s'], 4)} s per token."
        )
        rows = []
        for name, row in found["ratios"].items():
            expected = found["predicted_first"].get(name)
            predicted = "" if expected is None else f"{expected:.3f}"
            cells = [name, figure(row["first"]), predicted, figure(row.get("per_token"))]
            rows.append(cells)
        head = ["layers guarded, gate, dose", "first token", "predicted", "per token"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def _prediction(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            row["model"],
            str(row["text"]),
            str(row["whole"]),
            f"{row['shut']:.1%}",
            f"{row['open']:.1%}",
        ]
        for row in rows
    ]
    head = ["model", "text tokens", "prompt tokens", "gate shut", "gate open"]
    return f"""## What the text-only pass predicts

The predicted cost of the text-only pass is its share of the prompt's pass through the decoder: its
share of the tokens times its share of the layers. If the gate stays shut, the pass ends at the
gate's last layer, here at two thirds of the depth. If it opens and the text's coordinates are
restored, the pass ends at the last guarded layer. The prediction does not depend on the machine. It
leaves out the vision tower and the projector, so the share of the whole is smaller.

{table(head, cells)}"""


def _one_by_one(requests: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for one in requests:
        first, predicted = one["first"], one["predicted"]
        cells.append(
            [
                str(one["images"]),
                str(one["tokens"]["text"]),
                str(one["tokens"]["whole"]),
                figure(one["first_s"]),
                figure(first["unguarded again"]),
                figure(first["shut"]),
                f"{predicted['shut']:.3f}",
                figure(first["shut, with refusal signs"]),
                figure(first["open"]),
                f"{predicted['open']:.3f}",
            ]
        )
    head = ["pictures", "text tokens", "prompt tokens", "unguarded, s", "unguarded again"]
    head += ["gate shut", "predicted", "shut, with refusal signs", "gate open", "predicted"]
    return f"""## One request at a time, with its text-only pass

Time to the first token, all layers guarded. A pass over few tokens takes more than its share,
because it reads all weights. The last request has about LLaVA-1.5's proportions. A gate that reads
refusal signs needs the logits, so its text-only pass goes on from its last layer to the head.

{table(head, cells)}"""


def _sharing(batches: Mapping[str, Any]) -> str:
    names = list(next(iter(batches.values())))
    rows = [[name, *(figure(found[name]) for found in batches.values())] for name in names]
    return f"""## A separate text-only pass, or one forward pass with the prompt

Time of the prompt with its text-only pass, relative to the prompt alone, without a guard. In one
forward pass the text's rows are as wide as the prompt's, nothing ends early, and a gate's decision
comes too late for the layers below it.

{table(["text-only pass", *(f"batch {batch}" for batch in batches)], rows)}"""


def _peers(found: Mapping[str, Any]) -> str:
    batches = found["llm"]
    names = list(next(iter(batches.values()))["ratios"])
    parts = []
    for title, key in (("Time per token", "per_token"), ("Time to first token", "first")):
        rows = [
            [name, *(figure(one["ratios"][name][key]) for one in batches.values())]
            for name in names
        ]
        parts.append(f"{title}:")
        parts.append(table(["all layers", *(f"batch {batch}" for batch in batches)], rows))
    tables = "\n\n".join(parts)
    notes = "\n".join(f"- {note}" for note in found["libraries"])
    return f"""## Other libraries, on the language model alone

The same language model, text only, in the same process. The libraries add a vector after every
layer at every token, without a gate. The naive hook and the guard with the paper's formula read
each layer's gate at the last prompt token and add along one direction at every token. The other
guards restore {found["rank"]} directions. The libraries' requirements (below) conflict with this
package's, so they are installed without them, with an older numpy than this package requires. The
benchmark first checks that their hooks steer as documented.

{notes}

{tables}"""


def _overhead(found: Mapping[str, Any]) -> str:
    batches = found["per_layer_us"]
    names = list(next(iter(batches.values())))
    rows = [[name, *(figure(one[name], 2) for one in batches.values())] for name in names]
    return f"""## Parts of the overhead

Microseconds per layer and decoding step, with hooks on every layer of a model whose layers do
nothing: the time of a step beyond the paired step of its twin without hooks. A guard's row includes
its hooks on the model itself.

{table(["hooks", *(f"batch {batch}" for batch in batches)], rows)}"""


def _rest(found: Mapping[str, Any]) -> str:
    bare, calibrated, directions = (
        figure(found["calibration"][name], digits)
        for name, digits in (("bare_s", 1), ("calibration", 3), ("of_it_directions", 3))
    )
    attaching = [[name, figure(one, 1)] for name, one in found["overhead"]["attaching_ms"].items()]
    rows = [
        [f"{title}, {name}", f"{value:.0f}"]
        for title, part in found["memory"].items()
        for name, value in part.items()
    ]
    return f"""## Attaching

{table(["once per `attach`", "ms"], attaching)}

## Calibration

Recording {found["pairs"]} anchor pairs and finding every layer's directions takes
{calibrated} times the bare forward passes of the same batches ({bare} s).
The directions alone take {directions}. The steering search, which generates answers,
is not included.

## Memory

{table(["peak growth of the process's own memory", "MB"], rows)}"""
