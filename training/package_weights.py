"""Put what was trained into the package: half precision, one safetensors file, 15 MB at most.

python -m training.package_weights --out training/out
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from training.common import log, stage, timed
from training.projector import FILE
from vlm_safeguard.embedded.assemble import MODELS
from vlm_safeguard.utils.files import write_whole

MODEL = MODELS["embedded"]
LIMIT = 15_000_000
VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION += ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "projection_dim")


def main() -> None:
    args = stage(__doc__)
    parts = {
        "projector": load_file(args.out / "projector" / FILE),
        "tower": load_file(args.out / "vision_tower" / "model.safetensors"),
    }
    tensors = {
        f"{kind}/{name.removeprefix('vision_model.')}": tensor.to(torch.float16)
        for kind, own in parts.items()
        for name, tensor in own.items()
        if tensor.is_floating_point()
    }
    target = MODEL.resource("weights.safetensors")
    temporary = target.with_suffix(".tmp")
    save_file(tensors, temporary)
    size = temporary.stat().st_size
    if size > LIMIT:
        temporary.unlink()
        raise SystemExit(f"the trained weights take {size} bytes, {LIMIT} at most")
    temporary.replace(target)
    vision = json.loads((args.out / "vision_tower" / "config.json").read_text())
    facts = {name: vision[name] for name in VISION if name in vision}
    text = json.dumps(facts, indent=1) + "\n"
    write_whole({MODEL.resource("vision_config.json"): text.encode()})
    log(f"{target.name}: {len(tensors)} tensors, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    with timed("package_weights"):
        main()
