"""Sound guards, made by hand."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

Files = tuple[bytes, bytes]  # guard.json, guard.safetensors


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """The safetensors format, from its description."""
    header, place, body = {}, 0, b""
    for name, values in tensors.items():
        data = values.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [place, place + len(data)],
        }
        place, body = place + len(data), body + data
    return framed(json.dumps(header).encode(), body)


def framed(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def seal(settings: dict[str, Any], blob: bytes) -> Files:
    whole = settings | {"tensors_sha256": hashlib.sha256(blob).hexdigest()}
    return json.dumps(whole, indent=1).encode(), blob


def sound(kind: str, seed: int = 0) -> Files:
    """A guard of one kind: "restore" (a gate that reads the refusal intent), "add" (one gate per
    layer), "old" (schema 1)."""
    chance = np.random.default_rng(seed)
    width, rank, layers = 12, 3, [1, 2, 4]
    mode = "restore" if kind == "old" else kind
    steering: dict[str, Any] = {"mode": mode, "layers": layers, "rank": rank, "tokens": 2}
    gates = [
        {"source": "text", "layers": [0, 3], "thresholds": [0.5, 0.0], "per_layer": False},
        {"source": "vlm", "layers": [2], "thresholds": [-1.25], "per_layer": False},
    ]
    if kind == "restore":
        gates[0] |= {
            "kind": "intent",
            "openings": [7, 40],
            "intent_weight": 1.5,
            "verdict_weight": 2.5,
            "reads_mean": True,
            "reads_probe": bool(seed % 2),
        }
        steering |= {"later": "refusal"} if seed % 2 else {}
    if kind == "add":
        steering |= {"alpha": 0.5, "query": "pass", "positions": "all", "tokens": None}
        gates[0] |= {"per_layer": True, "layers": [1, 3]}
    if kind == "old":
        steering["soft"] = 0.0
    tensors = {}
    for layer in steering.get("layers", []):
        rows = np.linalg.qr(chance.normal(size=(width, width)))[0][:rank]
        tensors[f"directions.{layer}"] = rows
        tensors[f"anchor.{layer}"] = chance.normal(size=rank)
        if "later" in steering:
            tensors[f"refusal.{layer}"] = chance.normal(size=(steering["tokens"] - 1, rank))
    for index, gate in enumerate(gates):
        wide = (1 + gate.get("reads_mean", False) + gate.get("reads_probe", False)) * width
        tensors[f"gate.{index}"] = chance.normal(size=(len(gate["layers"]), wide))
    digests = [hashlib.sha256(f"{kind}{seed}{n}".encode()).hexdigest() for n in range(4)]
    frame = {"before": 4, "after": 0, **({"probe": [30, 31]} if seed % 2 else {})}
    settings = {
        "schema_version": 1 if kind == "old" else 2,
        "model": {
            "name": "tiny-vlm",
            "config_sha256": digests[0],
            "weights_sha256": digests[1],
            "template_sha256": digests[2],
            **({"dtype": "bfloat16", "revision": "v1"} if seed % 2 else {}),
            "hidden_size": width,
            "layers": 6,
        },
        "markup": {"token_ids": [258], "before": [], "after": [3], "inner": [], "pad_id": 0},
        **({"frame": frame} if kind == "restore" else {}),
        "gates": gates,
        "steering": steering,
        "data_sha256": {"anchors.jsonl": digests[3]},
        "calibration": {
            "seconds": 12.5,
            "budget": {"false_positives": 0.02, "kl": 0.2},
            "proof": {"text": {"n": 10, "asr_unguarded": 0.5, "asr_guarded": 0.1}},
            "separability": {"text": {"auc": [0.5, 0.9, 1.0]}},
        },
    }
    return seal(settings, safetensors(tensors))


def seeds() -> list[Files]:
    return [sound(kind, seed) for kind in ("restore", "add", "old") for seed in (0, 1)]
