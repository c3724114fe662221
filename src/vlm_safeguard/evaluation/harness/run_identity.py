"""Records what a run was made from, so that no folder mixes two runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_safeguard.data.prompts import Prompt
from vlm_safeguard.errors import DataError, SafeguardError
from vlm_safeguard.utils.files import write_whole

PLAN = "plan.json"
DIGESTS = "sha256"


def claim(output: Path, plan: dict[str, Any], digests: dict[str, str]) -> None:
    """Write what a run is made from into ``output``, or refuse a folder that holds another run.

    Args:
        plan: what was asked for.
        digests: SHA-256 of what it was asked of, by a name to read (``weights of embedded``).

    Raises:
        SafeguardError: the folder's run differs; says in what.
    """
    path = output / PLAN
    facts = json.loads(json.dumps(plan | {DIGESTS: digests}))
    if path.exists():
        # Folders of earlier versions hold no digests: there the plan alone can be compared.
        before = {DIGESTS: facts[DIGESTS]} | _read(path)
        if differing := _differing(before, facts):
            raise SafeguardError(
                f"{output} holds a run of another plan or of other models or data ({PLAN}): "
                f"{'; '.join(differing)}. Name another folder with -o"
            )
    write_whole({path: (json.dumps(facts, indent=1) + "\n").encode()})


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SafeguardError(f"cannot read {path}: {error}. Name another folder with -o") from error
    if not isinstance(facts, dict) or not isinstance(facts.get(DIGESTS, {}), dict):
        raise SafeguardError(f"{path} is not a plan: name another folder with -o")
    return facts


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed: settings with both values, digests by the name of what they are of."""
    found = [
        f"{key} was {json.dumps(before.get(key))} and is {json.dumps(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if key != DIGESTS and before.get(key) != now.get(key)
    ]
    old, new = before[DIGESTS], now[DIGESTS]
    return found + [
        f"the {name} changed"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over everything a benchmark's prompts say. A picture that is a file counts by its
    bytes, wherever it lies; one that cannot be read (see ``data.inputs.query``) by that."""
    digest = hashlib.sha256()
    for prompt in prompts:
        picture = dict(prompt.picture or ())
        if picture.get("kind") == "file":
            picture["value"] = _picture_digest(Path(picture["value"]))
        facts = asdict(prompt) | {"picture": picture}
        digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _picture_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def file_digest(path: Path, what: str) -> str:
    """SHA-256 of a file.

    Raises:
        DataError: ``what`` cannot be read there.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror}") from error
