"""The table of requests written otherwise, on a tiny model."""

from __future__ import annotations

from pathlib import Path

from bench.text_forms import HEAD, gates_alone, measured
from tests import checkpoint, tiny
from vlm_safeguard.evaluation.harness.execution import Plan
from vlm_safeguard.model.loading import load
from vlm_safeguard.model.text_only import find_markup
from vlm_safeguard.utils.progress import Progress


def test_hidden_letters_open_a_gate_as_often_as_plain_ones(tmp_path: Path) -> None:
    folder, guard = checkpoint.save(tmp_path / "model"), tmp_path / "guard"
    loaded = load(folder)
    made = tiny.guard(loaded.model, [tiny.gate("text", 1)], layers=[2])
    made = tiny.changed(made, markup=find_markup(loaded))
    made.save_pretrained(guard)
    plan = Plan(
        models=(str(folder),),
        defences=("none", "guard"),
        benchmarks=("own_malicious",),
        settings=("text",),
        guard=str(guard),
        limit=8,
        max_tokens=2,
        batch=8,
    )
    lines = measured(plan, ["zero-width", "full-width"], Progress(quiet=True)).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert rows[0] == HEAD
    shares = {row[0]: [float(cell.split("%")[0]) for cell in row[1:]] for row in rows[2:]}
    assert list(shares) == ["plain", "zero-width", "full-width"]
    assert all(
        row[HEAD.index("Off subject, unguarded / guarded")].count("%") == 2 for row in rows[2:]
    )
    assert 0 < sum(shares["plain"][:2]) < 200  # the gate opens on some, not on all
    for form in ("zero-width", "full-width"):
        assert shares[form][0] >= shares["plain"][0] and shares[form][1] >= shares["plain"][1]
    alone = gates_alone(loaded, made, ["zero-width", "full-width"], 8).splitlines()[2:]
    assert [row.split(" (")[0] for line in alone for row in line.strip("| ").split(" | ")] == [
        cell for row in rows[2:] for cell in row[:3]
    ]
