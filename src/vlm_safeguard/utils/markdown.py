"""Writes Markdown tables and replaces generated blocks in pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = False) -> str:
    """A table without its last line break. ``numbers``: all columns but the first to the right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(head) - 1))]
    lines = [_row(head), f"|{'|'.join(rule)}|", *map(_row, rows)]
    return "\n".join(lines)


def with_block(text: str, start: str, block: str, end: str) -> str:
    """``text`` with ``block`` in place of what stands between the marks ``start`` and ``end``.

    Raises:
        ValueError: the text has no such marks.
    """
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"no block between {start} and {end}")
    return f"{before}{start}\n{block}\n{end}{after}"


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
