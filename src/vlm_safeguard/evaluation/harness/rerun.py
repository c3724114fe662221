"""Compares two runs of an evaluation, within their intervals.

Reads two ``results.json``. Where both have their ``responses.jsonl`` beside them, the verdicts are
compared prompt by prompt; else only the rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from vlm_safeguard.errors import DataError
from vlm_safeguard.utils.jsonl import read_object, read_rows
from vlm_safeguard.utils.stats import Rate, difference_interval, sign_flip, wilson

Cell = tuple[str, str, str, str]  # model, benchmark, setting, defence

PLACE = ("model", "benchmark", "setting", "defence")
# Other values make other figures, not another run.
SAME_PLAN = ("judge", "limit", "max_tokens", "attack", "defence_texts")
HITS: dict[str, tuple[str | None, tuple[str, ...]]] = {  # label of the prompts, verdicts
    "asr": ("harmful", ("complied",)),
    "over_refusal": ("harmless", ("refused",)),
    "off_subject": (None, ("off_subject",)),
    "degenerate": (None, ("degenerate", "empty")),
    "unscored": (None, ("",)),
}
LEVEL = 0.05


class Said(NamedTuple):
    """A verdict; "" for none. ``cluster`` names the prompt's question, "" where the file does not:
    then each prompt is taken for a question of its own."""

    label: str
    verdict: str
    cluster: str


Verdicts = dict[Cell, dict[str, Said]]  # by prompt


@dataclass(frozen=True)
class Compared:
    """One rate of one cell in both runs.

    Attributes:
        cell, rate: Where, and which; "cell" where its rates cannot be compared at all.
        first, second: Its values; None where a run lacks it.
        flips: Prompts whose verdict in this rate's sense changed; None without responses.
        p: Exact sign-flip test of the flips over questions, which is McNemar's where each question
            is asked once; None without responses.
        differs: Why this is more than chance, "" if it is not.
    """

    cell: Cell
    rate: str
    first: float | None
    second: float | None
    flips: int | None
    p: float | None
    differs: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(zip(PLACE, self.cell, strict=True)) | {
            name: value for name, value in asdict(self).items() if name != "cell"
        }


@dataclass(frozen=True)
class Run:
    """What is compared of a run."""

    path: Path
    plan: dict[str, Any]
    sizes: dict[Cell, int]  # prompts
    rates: dict[Cell, dict[str, Rate]]
    accuracy: dict[Cell, Rate]
    verdicts: Verdicts | None


def read_run(path: Path) -> Run:
    """A run from its ``results.json``, or from the folder that holds it.

    Raises:
        DataError: the file, or the responses beside it, are missing, broken or of another kind.
    """
    path = path / "results.json" if path.is_dir() else path
    facts = read_object(path, "results of an evaluation")
    try:
        sizes = {_place(entry): int(entry["n"]) for entry in facts["table"]}
        rates = {_place(entry): _rates(entry) for entry in facts["table"]}
        vqa = {
            (str(model), "easy_vqa", "picture", str(defence)): one
            for model, defences in facts["easy_vqa"].items()
            for defence, one in defences.items()
        }
        accuracy = {
            cell: Rate.from_dict({**one, "value": one["accuracy"]}) for cell, one in vqa.items()
        }
        plan = dict(facts["plan"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is not a results.json of vlm-safeguard evaluate "
            f"({type(error).__name__}: {error})"
        ) from error
    responses = path.with_name("responses.jsonl")
    own = path.name == "results.json" and responses.exists()
    verdicts = _verdicts(responses) if own else None
    return Run(path, plan, sizes, rates, accuracy, verdicts)


def compare_runs(first: Run, second: Run) -> list[Compared]:
    """Every rate of every cell that either run has.

    Rates differ if, with responses, an exact sign-flip test of the questions gives p < 0.05;
    without, if Newcombe's interval of the difference leaves out 0. A cell that one run lacks, or
    that has other prompts, always differs. Not corrected for the number of cells.

    Raises:
        DataError: the runs had another judge, limit or number of tokens.
    """
    for name in SAME_PLAN:
        values = first.plan.get(name), second.plan.get(name)
        if values[0] != values[1]:
            raise DataError(
                f"not two runs of one plan: {name} is {values[0]} in {first.path} and {values[1]} "
                f"in {second.path}"
            )
    found: list[Compared] = []
    for cell in dict.fromkeys([*first.sizes, *second.sizes]):
        found += _cell(cell, first, second)
    for cell in dict.fromkeys([*first.accuracy, *second.accuracy]):
        one, other = (run.accuracy.get(cell, wilson(0, 0)) for run in (first, second))
        found.append(_by_interval(cell, "accuracy", one, other))
        if one.n and other.n and one.n != other.n:
            why = f"{one.n} questions in one run, {other.n} in the other"
            found[-1] = replace(found[-1], differs=why)
    return found


def flipped(first: Run, second: Run) -> int | None:
    """Prompts whose verdict changed, over all cells that both have; None without responses."""
    if first.verdicts is None or second.verdicts is None:
        return None
    return sum(
        first.verdicts[cell][i].verdict != second.verdicts[cell][i].verdict
        for cell in first.verdicts.keys() & second.verdicts.keys()
        for i in first.verdicts[cell].keys() & second.verdicts[cell].keys()
    )


def rerun_page(found: Sequence[Compared], flips: int | None) -> str:
    """What differs, a line each, and a count."""
    lines = []
    for one in found:
        if one.differs:
            first, second = ("none" if v is None else f"{v:.1%}" for v in (one.first, one.second))
            values = f" {first} -> {second}" if one.rate != "cell" else ""
            lines.append(f"{' '.join(one.cell)}: {one.rate}{values}, {one.differs}")
    cells = len({one.cell for one in found})
    compared = "only rates compared, without responses" if flips is None else f"{flips} flipped"
    lines.append(
        f"{len(lines)} of {len(found)} rates in {cells} cells differ by more than their intervals "
        f"allow (verdicts: {compared})"
    )
    return "\n".join(lines) + "\n"


def _cell(cell: Cell, first: Run, second: Run) -> list[Compared]:
    def whole(why: str) -> list[Compared]:
        return [Compared(cell, "cell", None, None, None, None, why)]

    for run in (first, second):
        if cell not in run.sizes:
            return whole(f"not in {run.path}")
    size = first.sizes[cell]
    if size != second.sizes[cell]:
        return whole(f"{size} prompts in one run, {second.sizes[cell]} in the other")
    if first.verdicts is None or second.verdicts is None:
        one, other = first.rates[cell], second.rates[cell]
        return [_by_interval(cell, rate, one[rate], other[rate]) for rate in HITS]
    before, after = first.verdicts.get(cell, {}), second.verdicts.get(cell, {})
    if before.keys() != after.keys() or len(before) != size:
        return whole("the responses are not to the same prompts")
    return [_by_prompt(cell, rate, before, after) for rate in HITS]


def _by_prompt(
    cell: Cell,
    rate: str,
    one: dict[str, Said],
    other: dict[str, Said],
) -> Compared:
    label, hits = HITS[rate]
    # What either run could not score is in no rate; that it was not is a rate of its own.
    ids = [
        i
        for i, said in one.items()
        if label in (None, said.label)
        and (rate == "unscored" or (said.verdict and other[i].verdict))
    ]
    before, after = ([side[i].verdict in hits for i in ids] for side in (one, other))
    flips = sum(a != b for a, b in zip(before, after, strict=True))
    p = sign_flip(before, after, [one[i].cluster or other[i].cluster or i for i in ids])
    why = f"{flips} of {len(ids)} verdicts flipped (p = {p:.2g})" if p < LEVEL else ""
    values = [sum(side) / len(ids) if ids else None for side in (before, after)]
    return Compared(cell, rate, values[0], values[1], flips, p, why)


def _by_interval(cell: Cell, rate: str, one: Rate, other: Rate) -> Compared:
    why = ""
    if one.n and other.n:
        low, high = difference_interval(one, other)
        why = "" if low <= 0 <= high else f"difference {low:+.1%} to {high:+.1%}"
    elif one.n or other.n:
        why = "only one run has it"
    first, second = (side.value if side.n else None for side in (one, other))
    return Compared(cell, rate, first, second, None, None, why)


def _place(entry: dict[str, Any]) -> Cell:
    return entry["model"], entry["benchmark"], entry["setting"], entry["defence"]


def _rates(entry: dict[str, Any]) -> dict[str, Rate]:
    """The rates of a row of the table, counts made rates with their intervals."""
    return {
        "asr": Rate.from_dict(entry, "asr"),
        "over_refusal": Rate.from_dict(entry, "over_refusal"),
        "off_subject": wilson(entry.get("off_subject", 0), entry["n"]),
        "degenerate": wilson(entry["degenerate"] + entry["empty"], entry["n"]),
        "unscored": wilson(entry["unscored"], entry["n"]),
    }


def _verdicts(path: Path) -> Verdicts:
    found: Verdicts = {}
    for number, row in read_rows(path, "responses", (*PLACE, "id", "label", "verdict")):
        model, benchmark, setting, defence = (str(part) for part in _place(row))
        cell = found.setdefault((model, benchmark, setting, defence), {})
        if str(row["id"]) in cell:
            raise DataError(f"{path}, line {number}: a second response to {row['id']}")
        cell[str(row["id"])] = Said(
            str(row["label"]), str(row["verdict"] or ""), str(row.get("cluster") or "")
        )
    return found
