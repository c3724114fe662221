"""Serializes a guard to its two files, and parses and validates them.

``docs/guard-format.md`` is the specification. Files are not trusted: sizes are checked before
parsing, every name, type and shape must be as the settings say, and every failure is a
``GuardError``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from vlm_safeguard.artifact.config import MAX_MAGNITUDE, SCHEMA_VERSION, GuardConfig
from vlm_safeguard.errors import GuardError

CONFIG_FILE, TENSOR_FILE = "guard.json", "guard.safetensors"

MAX_JSON = 1 << 20  # bytes of guard.json
MAX_HEADER = 1 << 20  # bytes of the header of guard.safetensors
MAX_TENSOR_BYTES = 1 << 30  # bytes of all tensors' values
MAX_DEPTH = 16  # of objects and lists inside each other
MAX_VALUES = 100_000  # numbers, texts, objects, lists in one file
MAX_TEXT = 4096  # characters of one text
MAX_INTEGER = 2**53  # beyond it other readers of JSON lose digits
MIN_ANCHOR = 1e-4  # length of coordinates that `restore` may put back; far below any real ones
ORTHONORMAL = 1e-3  # largest deviation of an inner product of two directions

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def read(fetch: Callable[[str, int], bytes]) -> tuple[GuardConfig, dict[str, Tensor]]:
    """Read and check a guard.

    Args:
        fetch: returns the file of a name, or refuses it if it is larger than a number of bytes.
            The settings are fetched first, because they determine the size of the tensors.

    Raises:
        GuardError: a check fails; the message says which.
    """
    config = parse_settings(fetch(CONFIG_FILE, MAX_JSON))
    blob = fetch(TENSOR_FILE, 8 + MAX_HEADER + config.tensor_bytes())
    return config, parse_tensors(blob, config)


def render(config: GuardConfig, tensors: dict[str, Tensor]) -> tuple[GuardConfig, bytes, bytes]:
    """The files of a guard.

    The settings are checked with ``parse_settings``, so a saved guard can be loaded.

    Returns:
        The settings with the digest of the tensors, and the bytes of ``guard.json`` and
        ``guard.safetensors``.

    Raises:
        GuardError: the mode is ``erase``, or the settings hold NaN or Inf or exceed a limit.
    """
    if config.steering.mode == "erase":
        raise GuardError(
            "`erase` alone removes refusals: it is an ablation for experiments and is never "
            "saved as a guard"
        )
    blob = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    config = config.model_copy(update={"tensors_sha256": hashlib.sha256(blob).hexdigest()})
    try:
        text = json.dumps(config.model_dump(), indent=1, allow_nan=False) + "\n"
    except (ValueError, TypeError) as error:
        raise GuardError(
            "the guard's settings or calibration record hold NaN, Inf or values that JSON cannot "
            "hold"
        ) from error
    settings = text.encode()
    parse_settings(settings)
    return config, settings, blob


# -- guard.json ----------------------------------------------------------------------------------


def parse_settings(data: bytes) -> GuardConfig:
    """Parse ``guard.json`` and check it.

    Raises:
        GuardError: it is too large, not strict JSON, beyond a limit or of another schema, or a
            field is wrong.
    """
    raw = _strict_json(data, MAX_JSON, CONFIG_FILE)
    if not isinstance(raw, dict):
        raise GuardError(f"{CONFIG_FILE} is not a JSON object: calibrate again")
    raw = upgraded(raw)
    version = raw.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise GuardError(
            f"{CONFIG_FILE} has guard schema {_brief(version)}, this version reads "
            f"{SCHEMA_VERSION}: calibrate again or install the version that wrote it"
        )
    try:
        config = GuardConfig.model_validate(raw, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(ascii(str(part))[1:-1][:80] for part in first["loc"])
        raise GuardError(f"{CONFIG_FILE}: {place}: {first['msg']}") from error
    if config.steering.mode == "erase":
        raise GuardError("`erase` is an ablation and cannot be loaded as a guard")
    if not config.tensors_sha256:
        raise GuardError(f"{CONFIG_FILE}: tensors_sha256: no digest of {TENSOR_FILE}")
    if config.tensor_bytes() > MAX_TENSOR_BYTES:
        raise GuardError(
            f"{CONFIG_FILE} calls for {config.tensor_bytes()} bytes of tensors, larger than any "
            f"guard ({MAX_TENSOR_BYTES} at most)"
        )
    return config


def upgraded(raw: dict[str, Any]) -> dict[str, Any]:
    """Convert settings of schema 1 to schema 2. Others are returned unchanged.

    Raises:
        GuardError: the guard uses what schema 2 dropped: soft gates (``steering.soft``) or the mode
            ``defer``.
    """
    steering = raw.get("steering")
    if type(raw.get("schema_version")) is not int or raw["schema_version"] != 1:
        return raw
    if not isinstance(steering, dict):
        return raw | {"schema_version": SCHEMA_VERSION}
    soft = steering.get("soft", 0)
    gone = "the mode `defer`" if steering.get("mode") == "defer" else None
    if isinstance(soft, bool) or not isinstance(soft, (int, float)) or soft != 0:
        gone = gone or "soft gates (`soft`)"
    if gone:
        raise GuardError(
            f"{CONFIG_FILE} is of schema 1 and uses {gone}, which this version no longer has: "
            "calibrate again with `vlm-safeguard calibrate MODEL -o GUARD`"
        )
    kept = {name: value for name, value in steering.items() if name != "soft"}
    return raw | {"schema_version": SCHEMA_VERSION, "steering": kept}


def _strict_json(data: bytes, limit: int, name: str) -> Any:
    """Parse JSON by RFC 8259: UTF-8, no BOM, no NaN, each key once, within the limits."""
    if len(data) > limit:
        raise GuardError(f"{name} is larger than any guard's ({limit} bytes at most)")
    if data.startswith(b"\xef\xbb\xbf"):
        raise GuardError(f"{name} begins with a byte order mark: save it as plain UTF-8")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise GuardError(f"{name} has the key {_brief(twice)} twice in one object")
        return found

    def constant(text: str) -> NoReturn:
        raise GuardError(f"{name} holds {text}, which is not a JSON number")

    def integer(text: str) -> int:
        if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
            raise GuardError(f"{name} holds the integer {text[:20]}…, larger than any in a guard")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise GuardError(f"{name} holds the number {text[:20]}, which is not finite")
        return value

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_int=integer,
            parse_float=real,
        )
    except UnicodeDecodeError as error:
        raise GuardError(f"{name} is not UTF-8: calibrate again") from error
    except RecursionError as error:
        raise GuardError(f"{name} is nested deeper than any guard's") from error
    except ValueError as error:
        raise GuardError(f"{name} is not valid JSON: calibrate again") from error
    _check_extent(value, name)
    return value


def _check_extent(value: Any, name: str) -> None:
    """Check depth, number of values and texts of parsed JSON."""
    count, waiting = 0, [(value, 1)]
    while waiting:
        here, depth = waiting.pop()
        count += 1
        if isinstance(here, str):
            if len(here) > MAX_TEXT:
                raise GuardError(f"{name} holds a text of more than {MAX_TEXT} characters")
            if _UNPRINTABLE.search(here):
                raise GuardError(f"{name} holds a text with control characters: {_brief(here)}")
        elif isinstance(here, (dict, list)):
            if depth > MAX_DEPTH:
                raise GuardError(f"{name} is nested deeper than {MAX_DEPTH} levels")
            inner = [*here, *here.values()] if isinstance(here, dict) else here
            waiting += [(part, depth + 1) for part in inner]
        if count + len(waiting) > MAX_VALUES:
            raise GuardError(f"{name} holds more than {MAX_VALUES} values")


def _brief(value: Any) -> str:
    """A value for an error message: escaped, and cut."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- guard.safetensors ---------------------------------------------------------------------------


def parse_tensors(blob: bytes, config: GuardConfig) -> dict[str, Tensor]:
    """Parse ``guard.safetensors`` and check it against ``config``.

    Raises:
        GuardError: the digest or the header is wrong, or ``check_tensors`` refuses the values.
    """
    if hashlib.sha256(blob).hexdigest() != config.tensors_sha256:
        raise GuardError(
            f"{TENSOR_FILE} does not match the digest in {CONFIG_FILE}: the guard is torn or was "
            "changed. Fetch it again or calibrate again"
        )
    _check_header(blob, config)
    try:
        tensors = load_tensors(blob)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise GuardError(f"{TENSOR_FILE} is damaged: calibrate again") from error
    check_tensors(tensors, config)
    return tensors


def _check_header(blob: bytes, config: GuardConfig) -> None:
    """Check the header: exactly the expected tensors, float32, without gaps."""
    length = int.from_bytes(blob[:8], "little")
    if len(blob) < 8 or length > MAX_HEADER or 8 + length + config.tensor_bytes() != len(blob):
        raise GuardError(
            f"{TENSOR_FILE} does not have the size that the settings call for: calibrate again"
        )
    header = _strict_json(blob[8 : 8 + length], MAX_HEADER, f"the header of {TENSOR_FILE}")
    shapes = config.shapes()
    if not isinstance(header, dict) or header.keys() != shapes.keys():
        found = header if isinstance(header, dict) else {}
        wrong = sorted(found.keys() ^ shapes.keys())
        raise GuardError(
            f"the guard's tensors do not fit its settings: {_brief(wrong[0] if wrong else header)} "
            "is missing or unexpected"
        )
    places: list[tuple[int, int]] = []
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        entry = header[name]
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise GuardError(f"{TENSOR_FILE}: the entry of {name} is malformed")
        if entry["dtype"] != "F32":
            raise GuardError(f"the guard's tensor {name} is {_brief(entry['dtype'])}, not float32")
        if not _integers(entry["shape"]) or entry["shape"] != list(shape):
            raise GuardError(
                f"the guard's tensor {name} has shape {_brief(entry['shape'])}, its settings call "
                f"for {list(shape)}"
            )
        offsets = entry["data_offsets"]
        if not _integers(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
            raise GuardError(f"{TENSOR_FILE}: the data offsets of {name} do not match its size")
        places.append((offsets[0], offsets[1]))
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise GuardError(f"{TENSOR_FILE}: tensors overlap or leave gaps")
        end = stop


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int for part in value)


def check_tensors(tensors: dict[str, Tensor], config: GuardConfig) -> None:
    """Check tensors against the settings.

    Raises:
        GuardError: names, shapes or layers do not fit, values are not finite float32, directions
            are not orthonormal, or what ``restore`` restores is zero.
    """
    expected = config.shapes()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise GuardError(f"the guard's tensors do not fit its settings: {wrong[:3]}")
    used = [*config.steering.layers, *(n for gate in config.gates for n in gate.layers)]
    if any(not 0 <= layer < config.model.layers for layer in used):
        raise GuardError(f"the guard names layers outside 0..{config.model.layers - 1}")
    for name, tensor in tensors.items():
        # NaN fails the comparison too.
        if tensor.dtype != torch.float32 or not (tensor.abs() <= MAX_MAGNITUDE).all():
            raise GuardError(
                f"the guard's tensor {name} is not finite float32 of at most {MAX_MAGNITUDE:g}"
            )
    for layer in config.steering.layers:
        rows = tensors[f"directions.{layer}"].double()
        if (rows @ rows.T - torch.eye(len(rows))).abs().max() > ORTHONORMAL:
            raise GuardError(f"the directions of layer {layer} are not orthonormal")
        if config.steering.mode != "restore":
            continue
        restored = {"anchor": tensors[f"anchor.{layer}"]}
        if config.steering.later == "refusal":
            restored["refusal"] = tensors[f"refusal.{layer}"]
        for what, coordinates in restored.items():
            if coordinates.double().norm(dim=-1).min() < MIN_ANCHOR:
                raise GuardError(
                    f"the {what} of layer {layer} is zero or nearly so: restoring it would erase "
                    "refusals, so it is not loaded as a guard"
                )
