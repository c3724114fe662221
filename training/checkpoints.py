"""Checkpoints of training: a run resumes only from one with its own settings and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from training.pictures import write_via_rename
from vlm_safeguard.embedded.base_llm import sha256_file


def fingerprint(facts: Any, files: Sequence[Path] = ()) -> str:
    """A digest of settings (as JSON) and of files: what a checkpoint must agree with."""
    digest = hashlib.sha256(json.dumps(facts).encode())
    for path in files:
        digest.update(sha256_file(path).encode())
    return digest.hexdigest()


def save_checkpoint(
    path: Path, module: nn.Module, optimizers: Sequence[Optimizer], progress: dict[str, Any]
) -> None:
    """Store parameters, optimiser state and progress in one file, so that they cannot disagree.

    Args:
        progress: as JSON; its "fingerprint" is asked for by ``load_checkpoint``.
    """
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                tensors[f"optimizer{number}.{index}.{name}"] = value
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    metadata = {"progress": json.dumps(progress)}
    write_via_rename(path, lambda target: save_file(tensors, target, metadata=metadata))


def load_checkpoint(
    path: Path, module: nn.Module, optimizers: Sequence[Optimizer], expected: str
) -> dict[str, Any]:
    """Restore a checkpoint and return its progress; empty where there is no checkpoint.

    Raises:
        SystemExit: its fingerprint is not ``expected``.
    """
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as stored:
        progress: dict[str, Any] = json.loads((stored.metadata() or {}).get("progress", "{}"))
        if progress.get("fingerprint") != expected:
            raise SystemExit(
                f"{path} was made with other settings or data: delete it to begin anew"
            )
        groups: dict[str, dict[str, Tensor]] = {}
        names = stored.keys()
        for name in names:
            kind, rest = name.split(".", 1)
            groups.setdefault(kind, {})[rest] = stored.get_tensor(name)
    module.load_state_dict(groups["module"])
    for number, optimizer in enumerate(optimizers):
        _restore(optimizer, groups.get(f"optimizer{number}", {}))
    return progress


def _restore(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
