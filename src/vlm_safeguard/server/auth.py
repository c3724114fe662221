"""API keys: who may ask, and who may see gate scores."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable

from starlette.datastructures import Headers

from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.utils.network import asked_from_here

KEYS, TRUSTED_KEYS = "VLM_SAFEGUARD_API_KEYS", "VLM_SAFEGUARD_TRUSTED_KEYS"


def keys_from(variable: str) -> frozenset[str]:
    """Keys from an environment variable, separated by commas."""
    return frozenset(filter(None, (key.strip() for key in os.environ.get(variable, "").split(","))))


def is_trusted(headers: Headers, settings: Settings) -> bool:
    """Check the key in the headers of a request. Returns whether it may see gate scores.

    Raises:
        RequestError: no key, or a wrong one; without keys, a request that another site's page or
            name led here.
    """
    if settings.open:
        if not asked_from_here(headers.get("host", ""), headers.get("origin")):
            raise RequestError(
                403, "without API keys, only this machine may ask", "permission_denied"
            )
        return True
    kind, _, key = headers.get("authorization", "").partition(" ")
    given = key.strip() if kind.lower() == "bearer" else ""
    # Both are looked through whole, so that time tells nothing.
    trusted, known = _holds(settings.trusted_keys, given), _holds(settings.api_keys, given)
    if not trusted and not known:
        raise RequestError(401, "no valid API key in the Authorization header", "invalid_api_key")
    return trusted


def _holds(keys: Iterable[str], given: str) -> bool:
    found = False
    for key in keys:
        found |= hmac.compare_digest(key.encode(), given.encode())
    return found
