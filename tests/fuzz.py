"""Hostile guard files: mutations of sound ones, and what must hold of any that still loads.

python -m tests.fuzz --count 100000 [--seed 0] [--only N]

Prints a JSON summary; exit code 1 if anything but a ``GuardError`` was raised, or a guard was
loaded that breaks one of the rules below. The rules are written from docs/guard-format.md with
json and numpy, not with the package. Mutation N of a seed is the same in every run: ``--only N``
repeats it alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import Guard

Files = tuple[bytes, bytes]  # guard.json, guard.safetensors

# -- sound guards, made by hand ------------------------------------------------------------------


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
    """A guard of one kind: "restore", "add" (one gate per layer), "old" (schema 1)."""
    chance = np.random.default_rng(seed)
    width, rank, layers = 12, 3, [1, 2, 4]
    mode = "restore" if kind == "old" else kind
    steering: dict[str, Any] = {"mode": mode, "layers": layers, "rank": rank, "tokens": 2}
    gates = [
        {"source": "text", "layers": [0, 3], "thresholds": [0.5, 0.0], "per_layer": False},
        {"source": "vlm", "layers": [2], "thresholds": [-1.25], "per_layer": False},
    ]
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
    for index, gate in enumerate(gates):
        tensors[f"gate.{index}"] = chance.normal(size=(len(gate["layers"]), width))
    digests = [hashlib.sha256(f"{kind}{seed}{n}".encode()).hexdigest() for n in range(4)]
    settings = {
        "schema_version": 1 if kind == "old" else 2,
        "model": {
            "name": "tiny-vlm",
            "config_sha256": digests[0],
            "weights_sha256": digests[1],
            "template_sha256": digests[2],
            **({"dtype": "bfloat16"} if seed % 2 else {}),
            "hidden_size": width,
            "layers": 6,
        },
        "markup": {"token_ids": [258], "before": [], "after": [3], "inner": [], "pad_id": 0},
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


# -- mutations -----------------------------------------------------------------------------------

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 5, 6, 7, 12, 64, 255, 1000, 1024, 65536, 2**31, 2**53,
    2**53 + 1, 2**63, 2**64, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.0, 1e-320, 1e19, 1e21, 1e38, 1e39,
    1e308, float("nan"), float("inf"), float("-inf"), "", "0", "1", "nan", "text", "vlm", "add",
    "restore", "erase", "defer", "all", "pass", "F32", "F64", "F16", "BF16", "I64", "BOOL", "f32",
    "\x00", "\ud800", "\u202e", "\u2028", "\x1b[31m", "é", "x" * 5000, "a" * 64, "A" * 64,
    "../../etc/passwd", [], {}, [0], [1], [0, 0], [1, 1], [1.5], ["1"], [None], [[]], [[[[]]]],
    {"": 0}, {"a": {}}, list(range(40)), [0] * 2000, [-1], [99], [1, 2, 4, 4], [0, 4], [4, 0],
    [0, 2**62],
]  # fmt: skip
KEYS = [
    "", "x", "schema_version", "model", "gates", "steering", "mode", "layers", "rank", "tokens",
    "__metadata__", "directions.1", "directions.01", "directions.5", "anchor.1", "gate.0",
    "gate.9", "__class__", "dtype", "shape", "data_offsets", "tensors_sha256", "\x00", "\ud800",
    "budget", "Model", "model ", "k" * 300,
]  # fmt: skip


class Twice(dict):
    """An object that is written with one key twice."""


def dump(value: Any) -> str:
    """JSON that also says what JSON may not: keys twice, NaN, lone surrogates."""
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)}: {dump(part)}" for key, part in value.items()]
        if isinstance(value, Twice) and pairs:
            pairs.append(pairs[0])
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path]
    inner: Any = value.items() if isinstance(value, dict) else []
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, part in inner:
        found += places(part, (*path, key))
    return found


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple, part: Any) -> Any:
    if not path:
        return part
    at(value, path[:-1])[path[-1]] = part
    return value


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def json_aware(tree: Any, chance: random.Random) -> Any:
    """One change somewhere in a tree of JSON values."""
    path = chance.choice(places(tree))
    here = at(tree, path)
    kind = chance.randrange(9)
    if kind == 0:
        return put(tree, path, copied_nasty(chance))
    if kind == 1:  # another value from elsewhere in the tree
        return put(tree, path, copied(at(tree, chance.choice(places(tree)))))
    if kind == 2 and isinstance(here, (int, float)) and not isinstance(here, bool):
        near: list[Any] = [here + 1, here - 1, -here, here * 2, float(here), str(here), here / 3]
        return put(tree, path, chance.choice(near))
    if kind == 3 and isinstance(here, dict) and here:
        key = chance.choice(list(here))
        renamed = chance.choice([*KEYS, key + "x", key.upper(), key[:-1]])
        return put(tree, path, {renamed if k == key else k: v for k, v in here.items()})
    if kind == 4 and isinstance(here, dict) and here:
        key = chance.choice(list(here))
        return put(tree, path, {k: v for k, v in here.items() if k != key})
    if kind == 5 and isinstance(here, dict):
        return put(tree, path, here | {chance.choice(KEYS): copied_nasty(chance)})
    if kind == 6 and isinstance(here, dict):
        return put(tree, path, Twice(here))
    if kind == 7 and isinstance(here, list):
        return put(tree, path, chance.choice([here + here, here[1:], here[::-1], [*here, 0]]))
    for _ in range(chance.choice([1, 3, 20, 2000])):
        here = [here] if chance.random() < 0.5 else {"a": here}
    return here if not path else put(tree, path, here)


def copied_nasty(chance: random.Random) -> Any:
    value = chance.choice(NASTY)
    return list(value) if isinstance(value, list) else value


def bytewise(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Bit flips, truncations, insertions, deletions, copies, splices with another file."""
    kind = chance.randrange(8)
    start = chance.randrange(len(data) + 1)
    stop = min(len(data), start + chance.choice([1, 2, 8, 64, 512]))
    if kind <= 1:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 1, 2, 8])):
            if changed:
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == 2:
        return data[:start]
    if kind == 3:
        return data[:start] + chance.randbytes(chance.choice([1, 2, 8, 64])) + data[start:]
    if kind == 4:
        return data[:start] + data[stop:]
    if kind == 5:
        return data[:start] + data[start:stop] * chance.choice([2, 3, 50]) + data[stop:]
    if kind == 6:
        return data[:start] + other[chance.randrange(len(other) + 1) :]
    edges = [b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"NaN", b"{", b"[" * 3000, b" ", b"\n", b"\xff"]
    return chance.choice([chance.choice(edges) + data, data + chance.choice(edges)])


def resealed(files: Files) -> Files:
    """Write the tensors' own digest into the settings, as somebody tampering would."""
    settings, blob = files
    digest = hashlib.sha256(blob).hexdigest().encode()
    return re.sub(rb'("tensors_sha256": ")[^"]*"', rb"\g<1>" + digest + b'"', settings), blob


def mutate_settings_bytes(files: Files, other: Files, chance: random.Random) -> Files:
    return bytewise(files[0], other[0], chance), files[1]


def mutate_settings_json(files: Files, other: Files, chance: random.Random) -> Files:
    tree = json.loads(files[0])
    if chance.random() < 0.1:  # a part of another guard
        key = chance.choice(list(tree))
        tree[key] = json.loads(other[0])[key]
    else:
        tree = json_aware(tree, chance)
    return dump(tree).encode("utf-8", "surrogatepass"), files[1]


def mutate_fields(files: Files, other: Files, chance: random.Random) -> Files:
    """A wrong value of the right type, so that the checks behind the types are reached."""
    tree = json.loads(files[0])
    path, values = chance.choice(
        [
            (("steering", "mode"), ["erase", "restore", "add", "defer"]),
            (("steering", "rank"), [1, 2, 4, 12, 13, 1024]),
            (("steering", "layers"), [[1, 2, 6], [1], [], [4, 2, 1], [1, 2, 1023]]),
            (("gates", 0, "layers"), [[0, 6], [0], [3, 0], [0, 1000]]),
            (("model", "layers"), [1, 3, 4, 5, 1024]),
            (("model", "hidden_size"), [1, 11, 13, 65536]),
            (("schema_version",), [0, 1, 2, 3, 2.0, True, "2"]),
        ]
    )
    return json.dumps(put(tree, path, chance.choice(values))).encode(), files[1]


def mutate_tensor_bytes(files: Files, other: Files, chance: random.Random) -> Files:
    changed = files[0], bytewise(files[1], other[1], chance)
    return changed if chance.random() < 0.2 else resealed(changed)


def mutate_header(files: Files, other: Files, chance: random.Random) -> Files:
    settings, blob = files
    length = int.from_bytes(blob[:8], "little")
    header, body = blob[8 : 8 + length], blob[8 + length :]
    if chance.random() < 0.7:
        tree = json.loads(header)
        if chance.random() < 0.1:
            tree["__metadata__"] = chance.choice([{}, {"format": "pt"}])
        else:
            tree = json_aware(tree, chance)
        header = dump(tree).encode("utf-8", "surrogatepass")
    else:
        header = bytewise(header, other[1], chance)
    if chance.random() < 0.1:
        body = bytewise(body, other[1], chance)
    whole = framed(header, body)
    if chance.random() < 0.1:
        lengths = [0, 1, 7, length - 1, length + 1, len(blob), 2**20 + 1, 2**31, 2**63, 2**64 - 1]
        whole = (chance.choice(lengths) % 2**64).to_bytes(8, "little") + whole[8:]
    return resealed((settings, whole))


def mutate_values(files: Files, other: Files, chance: random.Random) -> Files:
    settings, blob = files
    length = int.from_bytes(blob[:8], "little")
    header, values = blob[: 8 + length], np.frombuffer(blob[8 + length :], "<f4").copy()
    for _ in range(chance.choice([1, 1, 3])):
        start = chance.randrange(len(values))
        part = slice(start, start + chance.choice([1, 12, 36]))
        kind = chance.randrange(6)
        if kind == 5:  # a whole tensor becomes nothing, or nearly
            told = chance.choice(list(json.loads(header[8:]).values()))
            begin, end = (place // 4 for place in told["data_offsets"])
            with np.errstate(all="ignore"):
                values[begin:end] *= np.float32(chance.choice([0, 1e-6]))
        elif kind == 0:
            odd = [math.nan, math.inf, -math.inf, 1e19, 1e21, 3e38, 1e-40, -0.0, 0.0]
            values[part] = chance.choice(odd)
        elif kind == 1:
            with np.errstate(all="ignore"):
                values[part] *= np.float32(chance.choice([2, -1, 1.0001, 1.01, 1e-3]))
        elif kind == 2:
            values[part] = values[part][::-1]
        elif kind == 3:
            values = np.roll(values, chance.choice([1, 12, -12]))
        else:
            values[part] = np.frombuffer(chance.randbytes(4), "<f4")[0]
    return resealed((settings, header + values.tobytes()))


def mutate_pair(files: Files, other: Files, chance: random.Random) -> Files:
    mixed = chance.choice([(files[0], other[1]), (other[0], files[1])])
    return mixed if chance.random() < 0.3 else resealed(mixed)


MUTATIONS: list[Callable[[Files, Files, random.Random], Files]] = [
    mutate_settings_bytes,
    mutate_settings_json,
    mutate_settings_json,
    mutate_fields,
    mutate_tensor_bytes,
    mutate_header,
    mutate_header,
    mutate_values,
    mutate_pair,
]


def mutation(number: int, seed: int, sources: list[Files]) -> tuple[str, Files]:
    """Mutation ``number``: its kind, and the files."""
    chance = random.Random(f"{seed}:{number}")
    source, other = chance.choice(sources), chance.choice(sources)
    wanted = chance.choice([1, 1, 1, 2])
    files, names = source, list[str]()
    while len(names) < wanted or files == source:
        change = chance.choice(MUTATIONS)
        try:
            files = change(files, other, chance)
        except (ValueError, IndexError, TypeError, KeyError, AttributeError, RecursionError):
            files, wanted = source, 1  # nothing was left that a second change could read
            names.clear()
            continue
        names.append(change.__name__.removeprefix("mutate_"))
    return names[-1], files


# -- what must hold of a guard that loads ----------------------------------------------------------

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
        {"reads_pictures", "data_sha256", "calibration"},
        "guard.json",
    )
    must(is_int(raw["schema_version"], 1, 2), "schema version")
    must(is_digest(raw["tensors_sha256"]), "digest of the tensors")
    must(isinstance(raw.get("reads_pictures", False), bool), "reads_pictures is true or false")
    model = raw["model"]
    digests = {"config_sha256", "weights_sha256"}
    check_keys(
        model, {"name", "template_sha256", "hidden_size", "layers"} | digests, {"dtype"}, "model"
    )
    must(model.get("dtype", "") in ("", "float32", "bfloat16", "float16"), "type")
    must(is_name(model["name"]), "name")
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
        check_keys(gate, {"source", "layers", "thresholds"}, {"per_layer", "kind"}, "gate")
        must(gate.get("kind", "linear") == "linear", "kind of a gate")
        must(gate["source"] in ("text", "vlm"), "source of a gate")
        must(type(gate.get("per_layer", False)) is bool, "per_layer")
        must(layer_list(gate["layers"], depth, 1), "layers of a gate")
        cuts = gate["thresholds"]
        must(isinstance(cuts, list) and len(cuts) == len(gate["layers"]), "a threshold each")
        must(all(is_number(cut, 1e20) for cut in cuts), "thresholds")
    steering = raw["steering"]
    optional = {"reference", "query", "positions", "rank", "alpha", "tokens"}
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
        if key in ("model", "markup", "steering", "gates"):
            for one, other in zip(expected, got, strict=True):
                must(all(other[name] == part for name, part in one.items()), f"same {key}")
        else:
            must(got == expected, f"same {key}")
    # The tensors, read a second way.
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length].decode("utf-8"), object_pairs_hook=once)
    width, steering = raw["model"]["hidden_size"], raw["steering"]
    rank = steering.get("rank", 1)
    shapes = {f"gate.{n}": (len(gate["layers"]), width) for n, gate in enumerate(raw["gates"])}
    for layer in steering.get("layers", []):
        shapes |= {f"directions.{layer}": (rank, width), f"anchor.{layer}": (rank,)}
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
        if name.startswith("anchor.") and steering["mode"] == "restore":
            must(np.linalg.norm(values.astype(np.float64)) > 0.999e-4, "an anchor to restore")
    must(total == len(body), "nothing beside the tensors")


# -- running -------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What became of the mutations."""

    count: int = 0
    seed: int = 0
    refused: int = 0
    loaded: int = 0  # changed in what the format leaves free, with every rule kept
    crashes: list[str] = field(default_factory=list)
    wrong_loads: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    refused_by: Counter[str] = field(default_factory=Counter)
    slowest_ms: float = 0.0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {
            "kinds": dict(self.kinds.most_common()),
            "refused_by": dict(self.refused_by.most_common()),
            "crashes": self.crashes[:20],
            "wrong_loads": self.wrong_loads[:20],
        }


CHECKS = {
    "size": "larger than|bytes of tensors|does not have the size",
    "encoding": "not UTF-8|byte order mark",
    "JSON syntax": "not valid JSON|not a JSON number|not finite$",
    "key twice": "twice",
    "nesting": "nested",
    "texts and integers": "control characters|a text of more|holds the integer",
    "schema version": "guard schema|not a JSON object",
    "mode erase": "`erase` is an ablation",
    "gone with schema 1": "is of schema 1 and uses",
    "not registered": "unknown steering mode|unknown kind of gate",
    "zero anchor": "the anchor of layer",
    "field": r"^guard\.json: ",
    "digest": "does not match the digest",
    "tensor names": "missing or unexpected",
    "tensor entry": "malformed|, not float32|settings call for|do not match its size|leave gaps",
    "layer range": "names layers outside",
    "values": "not finite float32",
    "orthonormal": "not orthonormal",
    "safetensors": "is damaged",
}


def reason(error: GuardError) -> str:
    """Which check refused."""
    found = (name for name, words in CHECKS.items() if re.search(words, str(error)))
    return next(found, f"other: {error}"[:200])


def run(numbers: range, seed: int = 0) -> Summary:
    """Load every mutation of ``numbers``."""
    sources, summary = seeds(), Summary(seed=seed)
    for files in sources:
        check_loaded(Guard.from_bytes(*files), files)  # the sound ones are sound
    began = time.perf_counter()
    for number in numbers:
        kind, files = mutation(number, seed, sources)
        summary.count += 1
        summary.kinds[kind] += 1
        before = time.perf_counter()
        try:
            guard = Guard.from_bytes(*files)
        except GuardError as error:
            summary.refused += 1
            summary.refused_by[reason(error)] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.format_exception_only(error)[-1].strip()
            summary.crashes.append(f"{number} {kind}: {last}"[:300])
        else:
            try:
                check_loaded(guard, files)
                summary.loaded += 1
            except Exception as error:
                summary.wrong_loads.append(f"{number} {kind}: {error!r}"[:300])
        summary.slowest_ms = max(summary.slowest_ms, 1e3 * (time.perf_counter() - before))
    summary.seconds = round(time.perf_counter() - began, 1)
    summary.slowest_ms = round(summary.slowest_ms, 1)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutations of guard files.")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this mutation alone")
    given = parser.parse_args()
    numbers = range(given.count) if given.only is None else range(given.only, given.only + 1)
    summary = run(numbers, given.seed)
    json.dump(summary.as_dict(), sys.stdout, indent=1)
    print()
    sys.exit(bool(summary.crashes or summary.wrong_loads))


if __name__ == "__main__":
    main()
