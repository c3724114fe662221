"""A lock that lets one thread at a time use a guarded model."""

from __future__ import annotations

import threading

from vlm_safeguard.errors import GuardRuntimeError


class OwnerThread:
    """Held by a thread for one ``generate`` call, or for one forward call outside of one.

    A holder that ended without giving back (its thread was killed in the middle) holds nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: threading.Thread | None = None

    @property
    def mine(self) -> bool:
        return self._holder is threading.current_thread()

    def take(self) -> None:
        """Take the turn, or keep it.

        Raises:
            GuardRuntimeError: another thread has it.
        """
        with self._changed:
            if self._held_by_another():
                raise GuardRuntimeError(
                    "another thread is using this guarded model: one call at a time"
                )
            self._holder = threading.current_thread()

    def give_back(self) -> None:
        with self._changed:
            if self.mine:
                self._holder = None
                self._changed.notify_all()

    def wait(self) -> None:
        """Wait until no other thread has it, then take it."""
        with self._changed:
            while self._held_by_another():
                self._changed.wait(0.1)  # and look again: a thread that dies tells nobody
            self._holder = threading.current_thread()

    def _held_by_another(self) -> bool:
        return self._holder is not None and not self.mine and self._holder.is_alive()
