"""Checks the JSON of a request body before it is validated.

Small bytes can become large objects: millions of empty lists, or an object whose million unknown
fields each get an error message. So a body is counted before it is parsed.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from vlm_safeguard.server.http_errors import RequestError

MAX_VALUES = 150_000  # more than the commas in the longest text that is accepted
MAX_FIELDS = 64  # of one object
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_json(data: bytes) -> None:
    """Check that ``data`` is JSON without NaN, Infinity, repeated fields or half characters.

    Raises:
        RequestError: it is not, or it holds too many values.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise RequestError(400, f"the body holds more than {MAX_VALUES} values")
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_fields, parse_constant=_constant, parse_float=_number
        )
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise RequestError(400, "the body is not valid Unicode in UTF-8") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply") from None
    except ValueError:  # its text quotes the body
        raise RequestError(400, "the body is not valid JSON") from None


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_FIELDS:
        raise RequestError(400, f"an object in the body has more than {MAX_FIELDS} fields")
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise RequestError(400, "an object in the body has a field twice")
    return fields


def _constant(_: str) -> NoReturn:
    raise RequestError(400, "NaN and Infinity are not JSON")


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise RequestError(400, "a number in the body is too large")
    return value
