"""Put what was trained into the package, in half precision: 15 MB at most for all models together.

The vision tower is that of every embedded model; a projector is of one.

    python -m training.package_weights tower --out training/out
    python -m training.package_weights projector --out training/out --model embedded --dtype float32

With another tower, every projector has to be trained anew. A projector's file names the tower that
it was trained beside, and a test compares.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from training.common import HERE, add_model, folder_of, log, timed
from vlm_safeguard.embedded.assemble import (
    BESIDE,
    MODELS,
    PROJECTOR,
    TOWER,
    VISION,
    EmbeddedModel,
)
from vlm_safeguard.embedded.base_llm import sha256_file
from vlm_safeguard.utils.files import write_whole

LIMIT = 15_000_000
FACTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FACTS += ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "projection_dim")
PREFIX = "vision_model."  # of the tower's tensors, in some versions of transformers


def package_tower(folder: Path, model: EmbeddedModel) -> None:
    """Take the vision tower, and what its configuration says of its shape, from ``folder``."""
    tensors = load_file(folder / "model.safetensors")
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    vision = json.loads((folder / "config.json").read_text())
    facts = {name: vision[name] for name in FACTS if name in vision}
    _write(named, model.resource(TOWER))
    text = json.dumps(facts, indent=1) + "\n"
    write_whole({model.resource(VISION): text.encode()})


def package_projector(path: Path, model: EmbeddedModel) -> None:
    """Take the projector from a file."""
    beside = {BESIDE: sha256_file(model.resource(TOWER))}
    _write(load_file(path), model.resource(PROJECTOR), beside)


def packaged_tower(model: EmbeddedModel) -> CLIPVisionModel:
    """The vision tower that ships, in float32."""
    tower = CLIPVisionModel(CLIPVisionConfig(**json.loads(model.resource(VISION).read_text())))
    tensors = load_file(model.resource(TOWER))
    tower.load_state_dict({name: tensors[name.removeprefix(PREFIX)] for name in tower.state_dict()})
    return tower.eval()


def _write(
    tensors: dict[str, Tensor], target: Path, metadata: dict[str, str] | None = None
) -> None:
    """Replace ``target``, unless all models' weights would take more than ``LIMIT``."""
    halves = {k: v.to(torch.float16) for k, v in tensors.items() if v.is_floating_point()}
    temporary = target.with_suffix(".tmp")
    save_file(halves, temporary, metadata)
    size = temporary.stat().st_size
    shipped = {model.resource(name) for model in MODELS.values() for name in (TOWER, PROJECTOR)}
    others = shipped - {target}
    total = size + sum(path.stat().st_size for path in others if path.is_file())
    if total > LIMIT:
        temporary.unlink()
        raise SystemExit(f"the trained weights take {total} bytes, {LIMIT} at most")
    temporary.chmod(0o644)
    temporary.replace(target)
    log(f"{target.name}: {len(halves)} tensors, {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    for part in ("tower", "projector"):
        parts.add_parser(part).add_argument("--out", type=Path, default=HERE / "out")
    add_model(parts.choices["projector"])
    args = parser.parse_args()
    if args.part == "tower":
        package_tower(args.out / "vision_tower", MODELS["embedded"])
    else:
        package_projector(folder_of(args) / "projector" / PROJECTOR, MODELS[args.model])


if __name__ == "__main__":
    with timed("package_weights"):
        main()
