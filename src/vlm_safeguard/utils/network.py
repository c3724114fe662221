"""Opens listening sockets and recognises requests that a web page redirected to this machine."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from vlm_safeguard.errors import SafeguardError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one.

    Raises:
        SafeguardError: the address cannot be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SafeguardError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}. Choose another "
            "with --port, or 0 for a free one"
        ) from error


def address(listener: socket.socket, host: str) -> str:
    """The address of a server that listens there, for people."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


def asked_from_here(host: str, origin: str | None) -> bool:
    """Whether the headers Host and Origin of a request name this machine.

    A site can lead its own name to 127.0.0.1, and any page may send requests there.
    """
    try:
        own = urlsplit(f"//{host}")
        if own.hostname not in LOOPBACK:
            return False
        return origin is None or urlsplit(origin).netloc == own.netloc
    except ValueError:  # no address at all
        return False
