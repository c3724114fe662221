"""Mutations of sound guard files."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fuzz.guards import Files, framed

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
    "gate.9", "later", "refusal.1", "refusal.01", "__class__", "dtype", "shape", "data_offsets",
    "tensors_sha256", "\x00", "\ud800", "budget", "Model", "model ", "k" * 300,
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
