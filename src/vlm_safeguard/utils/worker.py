"""Batches single jobs from many callers and runs them in one thread.

inspect_ai wants one answer and one judgement at a time, from many coroutines; a model works best on
many at once and cannot be asked from several threads. Here they wait for their turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, Queue
from typing import Generic, TypeVar

Job = TypeVar("Job")
Answer = TypeVar("Answer")


class Worker(Generic[Job, Answer]):
    """Has ``work`` do what waits, on threads of its own.

    Args:
        work: answers of a batch of jobs, in their order.
        name: of the threads.
        most: jobs taken from the queue together, at most.
        threads: how many take jobs, each for itself.
        gather: seconds without a newcomer after which those that were taken are begun.
        divide: the batches in which the jobs that were taken are done, as lists of their indices;
            all in one without it.
        hopeless: what ``work`` raises if every job would fail alike. After any other error each job
            of the batch is tried alone, so that one cannot spoil the rest.
    """

    def __init__(
        self,
        work: Callable[[list[Job]], Sequence[Answer]],
        name: str,
        most: int,
        *,
        threads: int = 1,
        gather: float = 0.0,
        divide: Callable[[list[Job]], list[list[int]]] | None = None,
        hopeless: tuple[type[Exception], ...] = (),
    ) -> None:
        self._work, self._hopeless = work, hopeless
        self._divide = divide or (lambda jobs: [list(range(len(jobs)))])
        self._most, self._gather = most, gather
        self._queue: Queue[tuple[Job, Future[Answer]] | None] = Queue()  # None: no more will come
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, daemon=True, name=name) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> Future[Answer]:
        """Queue a job; its answer, or what went wrong with it, comes in the future."""
        answer: Future[Answer] = Future()
        self._queue.put((job, answer))
        return answer

    def stop(self) -> None:
        """Cancel what waits. Nothing may be submitted later."""
        self._closing.set()
        self._queue.put(None)

    def close(self) -> None:
        """``stop``, and return when the threads have ended: one that still runs while the
        interpreter shuts down can take the process with it."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            taken = [first]
            while len(taken) < self._most:
                try:
                    one = self._queue.get(timeout=self._gather)
                except Empty:
                    break
                if one is None:
                    self._queue.put(None)  # found again when these are done
                    break
                taken.append(one)
            for batch in self._batches([job for job, _ in taken]):
                self._begin([taken[index] for index in batch])
        self._queue.put(None)  # for the next thread

    def _batches(self, jobs: list[Job]) -> list[list[int]]:
        """How jobs are done together: each alone if they cannot be divided, so that the one that is
        to blame is told."""
        try:
            return self._divide(jobs)
        except Exception:
            return [[index] for index in range(len(jobs))]

    def _begin(self, batch: list[tuple[Job, Future[Answer]]]) -> None:
        """Do those of a batch that are still wanted: none while the worker closes."""
        if self._closing.is_set():
            for _, answer in batch:
                answer.cancel()
        wanted = [one for one in batch if one[1].set_running_or_notify_cancel()]
        if wanted:
            self._do(wanted)

    def _do(self, batch: list[tuple[Job, Future[Answer]]]) -> None:
        try:
            found = list(zip(batch, self._work([job for job, _ in batch]), strict=True))
        except BaseException as error:
            hopeless = self._closing.is_set() or isinstance(error, self._hopeless)
            if len(batch) > 1 and not hopeless:
                for one in batch:
                    self._do([one])
                return
            for _, answer in batch:
                answer.set_exception(error)
            return
        for (_, answer), given in found:
            answer.set_result(given)
