"""Guard folders to change and compare."""

import hashlib
import json

import torch
from safetensors.torch import save

from tests import tiny
from vlm_safeguard.artifact.model_card import CARD_FILE
from vlm_safeguard.guard import CONFIG_FILE, TENSOR_FILE

FILES = sorted([CARD_FILE, CONFIG_FILE, TENSOR_FILE])
GATES = [tiny.gate("text", 1, 3, threshold=0.25), tiny.gate("vlm", 2, per_layer=True)]


def edit(folder, **changes):
    """Change top-level keys of guard.json."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_tensors(folder, tensors):
    """Replace the tensors and their digest, as somebody tampering would."""
    blob = tensors if isinstance(tensors, bytes) else save(tensors)
    (folder / TENSOR_FILE).write_bytes(blob)
    edit(folder, tensors_sha256=hashlib.sha256(blob).hexdigest())


def same(one, other):
    return one.config == other.config and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


def whole(folder):
    return (folder / CONFIG_FILE).read_text(), (folder / TENSOR_FILE).read_bytes()
