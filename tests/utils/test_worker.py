"""A worker whose jobs cannot be put into batches."""

from __future__ import annotations

import pytest

from vlm_safeguard.utils.worker import Worker


def test_jobs_that_cannot_be_divided_are_done_one_by_one() -> None:
    done: list[list[int]] = []

    def work(jobs: list[int]) -> list[int]:
        done.append(jobs)
        return [100 // job for job in jobs]

    def divide(jobs: list[int]) -> list[list[int]]:
        if 0 in jobs:
            raise ValueError("no batch with a zero")
        return [list(range(len(jobs)))]

    worker = Worker(work, "test", 3, gather=0.2, divide=divide)
    answers = [worker.submit(job) for job in (5, 0, 20)]
    assert answers[0].result(10) == 20 and answers[2].result(10) == 5
    with pytest.raises(ZeroDivisionError):
        answers[1].result(10)
    later = [worker.submit(job) for job in (1, 2)]
    assert [answer.result(10) for answer in later] == [100, 50]
    assert done == [[5], [0], [20], [1, 2]]
    worker.close()
