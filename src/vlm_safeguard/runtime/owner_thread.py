"""A turn that lets one thread at a time use a guarded model."""

from __future__ import annotations

import threading
from collections import deque


class OwnerThread:
    """Held by a thread for one ``generate`` call, or for one forward call outside of one.

    A holder that ended without giving back (its thread was killed in the middle) holds nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: threading.Thread | None = None
        self._waiting: deque[object] = deque()

    @property
    def mine(self) -> bool:
        return self._holder is threading.current_thread()

    def take(self) -> None:
        """Keep the turn, or wait for it behind those who came first."""
        with self._changed:
            if self.mine:
                return
            ticket = object()
            self._waiting.append(ticket)
            try:
                while self._held() or self._waiting[0] is not ticket:
                    self._changed.wait(0.1)  # and look again: a thread that dies tells nobody
                self._holder = threading.current_thread()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def give_back(self) -> None:
        with self._changed:
            if self.mine:
                self._holder = None
                self._changed.notify_all()

    def _held(self) -> bool:
        return self._holder is not None and self._holder.is_alive()
