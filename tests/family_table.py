"""Writes the tables of model families in ``docs/families.md`` and their count in the README.

python -m tests.family_table
"""

from __future__ import annotations

from pathlib import Path

from tests.families import FAMILIES, REFUSED, Family
from vlm_safeguard.calibration.doctor import describe
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.residual_stream import verify_residual_stream
from vlm_safeguard.utils.files import write_whole

ROOT = Path(__file__).parents[1]
START, END = "<!-- made by python -m tests.family_table -->", "<!-- end -->"


def summary() -> str:
    """The README's lines: how many families can be guarded and calibrated, and how many not."""
    names = [one.name for one in FAMILIES.values() if one.text_alone and ", " not in one.name]
    others = ", ".join(one.name for one in FAMILIES.values() if not one.text_alone)
    return (
        f"The test suite covers {len(names)} [model families](docs/families.md) of transformers, "
        f"with no code for any of them.\n{others} can be guarded but not calibrated, and "
        f"{len(REFUSED)} families are refused."
    )


def table() -> str:
    """The tables of the docs: families that can be guarded, and refused ones with the reason."""
    lines = [
        "| Family | Class in transformers | Decoder layers | Image tokens | Text-only version |",
        "|---|---|---|---|---|",
        *(_row(one) for one in FAMILIES.values()),
        "",
        "These families are refused:",
        "",
        "| Family | Reason |",
        "|---|---|",
        *(f"| {name} | {_reason(name)} |" for name in REFUSED),
    ]
    return "\n".join(lines)


def _row(one: Family) -> str:
    loaded = one.build()
    decoder = verify_residual_stream(loaded.model)
    skipped = f", {len(decoder.skipped)} of 4 cross-attention" if decoder.skipped else ""
    try:
        found = describe(loaded)
    except ModelError as error:
        tokens, reading = _code(*one.markup[0]), f"not available: {_after_colon(error)}"
    else:
        shown = found.image_tokens[:4] + (("...",) if len(found.image_tokens) > 4 else ())
        tokens = " ".join(filter(None, (_code(found.before), _code(*shown), _code(found.after))))
        reading = "exact" if one.exact else "exact up to white space"
    where = f"`{decoder.path}.layers`{skipped}"
    return f"| {one.name} | `{type(loaded.model).__name__}` | {where} | {tokens} | {reading} |"


def _code(*tokens: str) -> str:
    written = (token.replace("\n", "\\n").replace("|", "\\|") for token in tokens if token)
    return " ".join(f"`{token}`" for token in written)


def _reason(name: str) -> str:
    try:
        verify_residual_stream(REFUSED[name]().eval())
    except ModelError as error:
        return str(error)
    raise RuntimeError(f"{name} is not refused: move it into the matrix")


def _after_colon(error: ModelError) -> str:
    return str(error).split(": ", 1)[1].rstrip(".")


def documents() -> dict[Path, str]:
    """The text of each file with its table up to date."""
    tables = {ROOT / "docs" / "families.md": table(), ROOT / "README.md": summary()}
    return {path: _written_into(path.read_text("utf-8"), made) for path, made in tables.items()}


def _written_into(text: str, made: str) -> str:
    before, rest = text.split(START, 1)
    return f"{before}{START}\n{made}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    write_whole({path: text.encode() for path, text in documents().items()})
