"""Writes the tables of model families in ``docs/families.md`` and their count in the README.

python -m tests.family_table
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as REGISTERED,
)

from tests.families import FAMILIES, REFUSED, Family
from vlm_safeguard.calibration.doctor import describe
from vlm_safeguard.errors import ModelError
from vlm_safeguard.model.loading import LoadedModel
from vlm_safeguard.model.residual_stream import verify_residual_stream
from vlm_safeguard.utils import markdown
from vlm_safeguard.utils.files import write_whole

MODELS = Path(transformers.__file__).parent / "models"
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
    built = [(one, one.build()) for one in FAMILIES.values()]
    head = ["Family", "Class in transformers", "Decoder layers", "Image tokens"]
    parts = [
        f"transformers {version('transformers')} registers {len(REGISTERED)} types for images and "
        "text; the [last table](#all-registered-types) has them all.",
        markdown.table([*head, "Text-only version"], [_row(*one) for one in built]),
        "These families are refused:",
        markdown.table(["Family", "Reason"], [(name, _reason(name)) for name in REFUSED]),
        "### All registered types",
        _registered({type(loaded.model).__name__: one for one, loaded in built}),
    ]
    return "\n\n".join(parts)


def _registered(tried: dict[str, Family]) -> str:
    """A table of every type that transformers registers for images and text, with what is known.

    ``tried``: the families of the matrix by the name of their class.
    """
    refused = {type(build()).__name__ for build in REFUSED.values()}
    rows = []
    for kind, name in sorted(REGISTERED.items()):
        if name in tried:
            state = "tested" if tried[name].text_alone else "tested, cannot be calibrated"
        elif name in refused:
            state = "refused, see above"
        else:
            state = _by_source(kind, name)
        rows.append((f"`{kind}`", f"`{name}`", state))
    return markdown.table(["Type", "Class", "Guard"], rows)


def _by_source(kind: str, name: str) -> str:
    """What the source of a class that is not in the matrix says of it."""
    folder = MODELS / model_type_to_module_name(kind)
    sources = {path.name: path.read_text("utf-8") for path in sorted(folder.glob("*.py"))}
    code = "\n".join(text for file, text in sources.items() if file.startswith("modeling_"))
    body = re.search(rf"^class {name}\(.*?(?=^class |\Z)", code, re.DOTALL | re.MULTILINE)
    if body and "\n    def generate(" in body[0]:
        return "refused: its own generate()"
    settings = "\n".join(
        text for file, text in sources.items() if file.startswith("configuration_")
    )
    if re.search(r"^ +is_encoder_decoder.*= True", settings, re.MULTILINE):
        return "refused: encoder-decoder"
    return "not tried"


def _row(one: Family, loaded: LoadedModel) -> tuple[str, ...]:
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
    return one.name, f"`{type(loaded.model).__name__}`", where, tokens, reading


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
    return {
        path: markdown.with_block(path.read_text("utf-8"), START, made, END)
        for path, made in tables.items()
    }


if __name__ == "__main__":
    write_whole({path: text.encode() for path, text in documents().items()})
