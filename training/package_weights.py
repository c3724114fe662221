"""Put what was trained into the package: half precision, one safetensors file, 40 MB at most.

python -m training.package_weights --out training/out
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from training.common import log

PACKAGE = Path(__file__).parents[1] / "src" / "vlm_safeguard" / "embedded"
LIMIT = 40_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    vision = json.loads((args.out / "vision_tower" / "config.json").read_text())
    tensors = {}
    parts = {
        "align": args.out / "questions" / "lora.safetensors",
        "projector": args.out / "questions" / "projector.safetensors",
        "tower": args.out / "vision_tower" / "model.safetensors",
    }
    for kind, path in parts.items():
        for name, tensor in load_file(path).items():
            short = name.removeprefix("vision_model.") if kind == "tower" else name
            if tensor.is_floating_point():
                tensors[f"{kind}/{short}"] = tensor.to(torch.float16)
    target = PACKAGE / "weights.safetensors"
    temporary = target.with_suffix(".tmp")
    save_file(tensors, temporary)
    size = temporary.stat().st_size
    if size > LIMIT:
        temporary.unlink()
        raise SystemExit(f"the trained weights take {size} bytes, {LIMIT} at most")
    temporary.replace(target)
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keep += ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "projection_dim")
    facts = {k: vision[k] for k in keep if k in vision}
    (PACKAGE / "vision_config.json").write_text(json.dumps(facts, indent=1) + "\n")
    log(f"{target.name}: {len(tensors)} tensors, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
