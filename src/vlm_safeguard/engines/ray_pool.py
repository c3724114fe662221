"""Workers of Ray: each does parts of some work, on this machine or on others of a cluster.

A part whose worker was killed is done again by its successor, so work leaves nothing behind before
its result is returned.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from vlm_safeguard.errors import SafeguardError

RETRIES = 3  # times that a part is begun again, each after the death of its worker
WAIT = 10.0  # seconds, until workers that have ended make room
RESTARTS = 10  # of one worker: one that dies while it starts would be started forever
Part = TypeVar("Part", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Works(Protocol[Part, Result]):
    """What a worker is."""

    def work(self, part: Part) -> Result:
        """Do a part."""


class RayPool(Generic[Part, Result]):
    """Starts workers: in the cluster that ``RAY_ADDRESS`` names, else on this machine.

    Each takes one CPU, and one GPU where the cluster has any.

    Args:
        make: makes a worker, in its own process.
        arguments: of ``make``. What they name must be the same on every machine.
        workers: how many.

    Raises:
        SafeguardError: Ray is missing, or has no room for them, or a worker cannot be made.
    """

    def __init__(
        self, make: Callable[..., Works[Part, Result]], arguments: Sequence[Any], workers: int
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError as error:
            raise SafeguardError(
                f"--engine ray needs {error.name}: pip install 'vlm-safeguard[ray]'"
            ) from error
        self._ray = ray
        try:
            if not ray.is_initialized():
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise _told("Ray cannot be reached", error) from error
        on_gpu = int(ray.cluster_resources().get("GPU", 0) > 0)
        self._check_room(workers, "GPU" if on_gpu else "CPU")
        remote = ray.remote(make).options(
            num_cpus=1, num_gpus=on_gpu, max_restarts=RESTARTS, max_task_retries=RETRIES
        )
        self.actors = [remote.remote(*arguments) for _ in range(workers)]
        self._free: SimpleQueue[Any] = SimpleQueue()
        for actor in self.actors:
            self._free.put(actor)
        try:
            ray.get([actor.__ray_ready__.remote() for actor in self.actors])
        except ray.exceptions.RayActorError as error:
            raise _told("a worker of Ray cannot start", error) from error

    def _check_room(self, workers: int, unit: str) -> None:
        """Wait a little for what workers that have ended still hold: Ray frees it by and by."""
        total = self._ray.cluster_resources().get(unit, 0)
        until = time.monotonic() + WAIT
        free = self._free_of(unit)
        while free < workers <= total and time.monotonic() < until:
            time.sleep(0.1)
            free = self._free_of(unit)
        if workers > free:
            raise SafeguardError(
                f"{workers} workers need {workers} {unit}s, and Ray has {free} free: ask for fewer "
                "with --workers, or name a larger cluster in RAY_ADDRESS"
            )

    def _free_of(self, unit: str) -> int:
        return int(self._ray.available_resources().get(unit, 0))

    @property
    def size(self) -> int:
        """How many parts are done at once."""
        return len(self.actors)

    def work(self, part: Part) -> Result:
        """Have the next free worker do a part, and wait for it; for several threads.

        Raises:
            SafeguardError: the part ended several workers, one after the other.
            Exception: what the work raised.
        """
        actor = self._free.get()
        try:
            result: Result = self._ray.get(actor.work.remote(part))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error  # the other's text is the trace of its process
        except self._ray.exceptions.RayActorError as error:
            raise _told(f"{RETRIES + 1} workers of Ray ended", error) from error
        finally:
            self._free.put(actor)
        return result

    def map(self, parts: Iterable[Part]) -> Iterator[Result]:
        """The results of all parts, as they come.

        The first error ends it, and so does an interrupt. It does not wait for parts in progress
        then: ``close`` ends them.
        """
        threads = ThreadPoolExecutor(len(self.actors))
        try:
            for done in as_completed([threads.submit(self.work, part) for part in parts]):
                yield done.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the workers, also in the midst of a part. Where Ray was shut down, they have ended.

        Whoever waits for a part in another thread gets an error.
        """
        if self._ray.is_initialized():  # else Ray would start anew
            for actor in self.actors:
                self._ray.kill(actor)


def _told(what: str, error: Exception) -> SafeguardError:
    """An error of Ray's, whose text ends with the reason, after the trace of another process."""
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    reason = re.sub(r"^[\w.]+: ", "", last)  # without the name of its type
    return SafeguardError(f"{what}: {reason}")
