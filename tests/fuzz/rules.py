"""What must hold of a guard that loads."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

import numpy as np

from tests.fuzz.guards import Files
from vlm_safeguard.guard import Guard

MODES = {"add", "restore"}


class Broken(Exception):
    """A rule that does not hold."""


def must(holds: Any, rule: str) -> None:
    if not holds:
        raise Broken(rule)


def is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def is_number(value: Any, high: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= high


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_name(value: Any) -> bool:
    bad = {*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0xD800, 0xE000)}
    return isinstance(value, str) and len(value) <= 256 and not bad & set(map(ord, value))


def check_keys(value: Any, needed: set[str], optional: set[str], what: str) -> None:
    must(isinstance(value, dict), f"{what} is an object")
    must(needed <= set(value) <= needed | optional, f"{what} has its keys and no others")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    must(len({key for key, _ in pairs}) == len(pairs), "each key once")
    return dict(pairs)


def refuse(text: str) -> None:
    raise Broken(f"no {text}")


def layer_list(value: Any, depth: int, low: int) -> bool:
    return (
        isinstance(value, list)
        and low <= len(value) == len(set(value))
        and all(is_int(n, 0, depth - 1) for n in value)
    )


def check_settings(data: bytes) -> dict[str, Any]:
    """Every rule of the settings; returns them."""
    must(len(data) <= 2**20 and not data.startswith(b"\xef\xbb\xbf"), "size, no BOM")
    raw = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    check_tree(raw)
    check_keys(
        raw,
        {"schema_version", "model", "markup", "gates", "steering", "tensors_sha256"},
        {"frame", "reads_pictures", "reads_sentences", "data_sha256", "calibration"},
        "guard.json",
    )
    must(is_int(raw["schema_version"], 1, 2), "schema version")
    must(is_digest(raw["tensors_sha256"]), "digest of the tensors")
    for name in ("reads_pictures", "reads_sentences"):
        must(isinstance(raw.get(name, False), bool), f"{name} is true or false")
    model = raw["model"]
    digests = {"config_sha256", "weights_sha256"}
    needed = {"name", "template_sha256", "hidden_size", "layers"} | digests
    check_keys(model, needed, {"dtype", "revision"}, "model")
    must(model.get("dtype", "") in ("", "float32", "bfloat16", "float16"), "type")
    must(is_name(model["name"]) and is_name(model.get("revision", "")), "name and revision")
    must(all(is_digest(model[name]) for name in digests), "digests")
    must(model["template_sha256"] == "" or is_digest(model["template_sha256"]), "template")
    must(is_int(model["hidden_size"], 1, 65536) and is_int(model["layers"], 1, 1024), "size")
    markup = raw["markup"]
    check_keys(markup, {"token_ids"}, {"before", "after", "inner", "pad_id"}, "markup")
    for name in ("token_ids", "before", "after", "inner"):
        ids = markup.get(name, [])
        must(isinstance(ids, list) and len(ids) <= 256, f"{name} is a short list")
        must(all(is_int(n, 0, 2**31 - 1) for n in ids), f"{name} holds token ids")
    must(markup["token_ids"] and is_int(markup.get("pad_id", 0), 0, 2**31 - 1), "token ids")
    gates, depth = raw["gates"], model["layers"]
    must(isinstance(gates, list) and 1 <= len(gates) <= 16, "1 to 16 gates")
    for gate in gates:
        more = {"per_layer", "reads_mean", "reads_probe", "kind"}
        more |= {"openings", "intent_weight", "verdict_weight"}
        check_keys(gate, {"source", "layers", "thresholds"}, more, "gate")
        kind, openings = gate.get("kind", "linear"), gate.get("openings", [])
        must(kind in ("linear", "intent"), "kind of a gate")
        must(isinstance(openings, list) and len(openings) <= 64, "openings are a short list")
        must(all(is_int(n, 0, 2**31 - 1) for n in openings), "openings hold token ids")
        must(len(set(openings)) == len(openings), "each opening once")
        weight = gate.get("intent_weight", 0)
        must(is_number(weight, 1e20) and weight >= 0, "weight of the intent")
        verdict = gate.get("verdict_weight", 0)
        must(is_number(verdict, 1e20) and verdict >= 0, "weight of the verdict")
        must((kind == "intent") == bool(openings), "an intent gate has openings")
        must(bool(openings) == bool(weight or verdict), "openings have a weight")
        alone = bool(gate.get("per_layer", False))
        must(not openings or (gate["source"] == "text" and not alone), "intent is of the text")
        must(gate["source"] in ("text", "vlm"), "source of a gate")
        must(type(gate.get("per_layer", False)) is bool, "per_layer")
        mean = gate.get("reads_mean", False)
        must(type(mean) is bool, "reads_mean")
        must(not mean or (gate["source"] == "text" and not alone), "means are of the text")
        probe = gate.get("reads_probe", False)
        must(type(probe) is bool, "reads_probe")
        must(mean or not probe, "a probe beside a mean")
        must(layer_list(gate["layers"], depth, 1), "layers of a gate")
        cuts = gate["thresholds"]
        must(isinstance(cuts, list) and len(cuts) == len(gate["layers"]), "a threshold each")
        must(all(is_number(cut, 1e20) for cut in cuts), "thresholds")
    frame = raw.get("frame")
    if frame is not None:
        check_keys(frame, {"before", "after"}, {"probe"}, "frame")
        edges = [frame["before"], frame["after"]]
        must(all(is_int(n, 0, 65536) for n in edges), "numbers of tokens")
        ids = frame.get("probe", [])
        must(isinstance(ids, list) and len(ids) <= 256, "a probe is a short list")
        must(all(is_int(n, 0, 2**31 - 1) for n in ids), "a probe holds token ids")
        must(not set(ids) & set(markup["token_ids"]), "a probe holds no picture")
    means = any(gate.get("reads_mean", False) for gate in gates)
    must(means == (frame is not None), "a frame where means are read")
    probed = any(gate.get("reads_probe", False) for gate in gates)
    must(probed == bool((frame or {}).get("probe")), "a probe where one is read")
    steering = raw["steering"]
    optional = {"reference", "query", "positions", "rank", "alpha", "tokens", "later"}
    old = {"soft"} if raw["schema_version"] == 1 else set()
    check_keys(steering, {"mode", "layers"}, optional | old, "steering")
    must(steering["mode"] in MODES, "mode")
    must(steering.get("reference", "text") in ("text", "anchor"), "reference")
    must(steering.get("query", "text") in ("pass", "text"), "query")
    must(steering.get("positions", "generated") in ("generated", "all"), "positions")
    must(layer_list(steering["layers"], depth, 1), "steered layers")
    must(is_int(steering.get("rank", 1), 1, 1024), "rank")
    must(is_number(steering.get("alpha", 0), 1e4) and steering.get("alpha", 0) >= 0, "alpha")
    must(is_number(steering.get("soft", 0), 0.0), "no soft gate")
    must(steering.get("tokens") is None or is_int(steering["tokens"], 1, 10**6), "tokens")
    later = steering.get("later", "same")
    must(later in ("same", "refusal"), "later")
    if later == "refusal":
        must(steering["mode"] == "restore", "refusals are restored")
        must(is_int(steering.get("tokens"), 2, 64), "a refusal is short")
    steered = steering["layers"]
    for gate in gates:
        if gate.get("per_layer", False):
            must(any(layer in steered for layer in gate["layers"]), "a layer gate reaches a layer")
        elif gate["source"] == "vlm" and steering.get("tokens") == 1:
            must(max(gate["layers"]) <= max(steered), "a late gate reaches a layer")
    data_files = raw.get("data_sha256", {})
    must(isinstance(data_files, dict) and len(data_files) <= 64, "data files")
    must(all(is_name(k) and is_digest(v) for k, v in data_files.items()), "digests of data")
    record = raw.get("calibration", {})
    must(isinstance(record, dict), "record")
    budget = record.get("budget", {})
    must(isinstance(budget, dict), "budget")
    must(all(is_number(value, math.inf) for value in budget.values()), "budget in numbers")
    return raw


def check_tree(value: Any, depth: int = 1) -> int:
    """Rules of every value; returns how many there are."""
    if isinstance(value, (dict, list)):
        must(depth <= 16, "depth")
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        count = 1 + sum(check_tree(part, depth + 1) for part in parts)
        must(count <= 100_000, "number of values")
        return count
    if isinstance(value, str):
        must(len(value) <= 4096 and (len(value) > 256 or is_name(value)), "text")
    elif isinstance(value, int):
        must(abs(value) <= 2**53, "integers")
    elif isinstance(value, float):
        must(math.isfinite(value), "finite numbers")
    return 1


def check_loaded(guard: Guard, files: Files) -> None:
    """Every rule of a guard that was loaded from ``files``.

    Raises:
        Broken: the first that does not hold.
    """
    raw = check_settings(files[0])
    blob = files[1]
    must(hashlib.sha256(blob).hexdigest() == raw["tensors_sha256"], "digest")
    # The settings are those of the file: nothing converted, nothing dropped.
    found = guard.config.model_dump()
    must(found["schema_version"] == 2, "schema 2 in memory")
    if raw["schema_version"] == 1:  # as schema 2 has it
        kept = {name: value for name, value in raw["steering"].items() if name != "soft"}
        raw |= {"schema_version": 2, "steering": kept}
    for key, value in raw.items():
        expected = [value] if isinstance(value, dict) else value
        got = [found[key]] if isinstance(value, dict) else found[key]
        if key in ("model", "markup", "frame", "steering", "gates") and value is not None:
            for one, other in zip(expected, got, strict=True):
                must(all(other[name] == part for name, part in one.items()), f"same {key}")
        else:
            must(got == expected, f"same {key}")
    # The tensors, read a second way.
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length].decode("utf-8"), object_pairs_hook=once)
    width, steering = raw["model"]["hidden_size"], raw["steering"]
    rank = steering.get("rank", 1)
    shapes = {
        f"gate.{n}": (
            len(gate["layers"]),
            (1 + gate.get("reads_mean", False) + gate.get("reads_probe", False)) * width,
        )
        for n, gate in enumerate(raw["gates"])
    }
    for layer in steering.get("layers", []):
        shapes |= {f"directions.{layer}": (rank, width), f"anchor.{layer}": (rank,)}
        if steering.get("later") == "refusal":
            shapes[f"refusal.{layer}"] = (steering["tokens"] - 1, rank)
    must(set(header) == set(shapes) == set(guard.tensors), "names of tensors")
    total, body = 0, blob[8 + length :]
    for name, shape in shapes.items():
        entry = header[name]
        must(entry["dtype"] == "F32" and tuple(entry["shape"]) == shape, "type and shape")
        start, stop = entry["data_offsets"]
        must(0 <= start <= stop <= len(body), "within the file")
        values = np.frombuffer(body[start:stop], "<f4").reshape(shape)
        total += stop - start
        loaded = guard.tensors[name].numpy()
        must(loaded.dtype == np.float32 and loaded.tobytes() == values.tobytes(), "same values")
        must(np.isfinite(values).all() and (np.abs(values) <= 1e20).all(), "finite values")
        if name.startswith("directions."):
            exact = values.astype(np.float64)
            must(np.abs(exact @ exact.T - np.eye(rank)).max() < 1.001e-3, "orthonormal")
        if name.startswith(("anchor.", "refusal.")) and steering["mode"] == "restore":
            norms = np.linalg.norm(values.astype(np.float64), axis=-1)
            must(norms.min() > 0.999e-4, "something to restore")
    must(total == len(body), "nothing beside the tensors")
