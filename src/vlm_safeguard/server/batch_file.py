"""Files of OpenAI's batch format: the requests, and the answers so far.

Answers are appended to ``OUTPUT.partial`` as they come. When none is missing, that file becomes
``OUTPUT``. The id of an answer is a digest of its request and of what answers it, so a run that was
killed goes on, and no file mixes the answers of two.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_safeguard.errors import DataError, SafeguardError
from vlm_safeguard.utils.files import drop_torn_line
from vlm_safeguard.utils.jsonl import read_rows, text_of
from vlm_safeguard.utils.locks import held

METHOD, URL = "POST", "/v1/chat/completions"
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Task:
    """One request of a batch.

    Attributes:
        id: of its answer.
        custom_id: the user's name for it.
        body: as it came, not checked yet.
    """

    id: str
    custom_id: str
    body: Any


def read_tasks(path: Path, answered_by: str) -> list[Task]:
    """The requests in a file, in order.

    Args:
        path: the file.
        answered_by: a digest of the guard and the settings that answer them.

    Raises:
        DataError: names the line that is broken, has other fields, repeats a custom_id, or is for
            another method or url. What a body says is checked when it is answered.
    """
    found: dict[str, Task] = {}
    for number, row in read_rows(path, "requests", _FIELDS):
        where = f"{path}, line {number}"
        if unknown := sorted(row.keys() - set(_FIELDS)):
            raise DataError(f"{where}: {unknown[0]!r} is no field of a batch: take it out")
        name = text_of(row, "custom_id", where)
        if why := _unusable(name, found):
            raise DataError(f"{where}: the custom_id {name!r} {why}: answers are told apart by it")
        for field, known in (("method", METHOD), ("url", URL)):
            if row[field] != known:
                raise DataError(f"{where}: {field} {row[field]!r} is not answered, only {known!r}")
        if not isinstance(row["body"], dict):
            raise DataError(f"{where}: the body is not an object")
        asked = json.dumps([answered_by, name, row["body"]], sort_keys=True)
        made = f"batch_req_{hashlib.sha256(asked.encode()).hexdigest()[:32]}"
        found[name] = Task(made, name, row["body"])
    return list(found.values())


def _unusable(name: str, found: Container[str]) -> str:
    if not name:
        return "is empty"
    if name in found:
        return "is there twice"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is no valid Unicode"
    return ""


class Answers:
    """The answers to a batch: see ``answers``.

    ``missing``: the requests that have none yet. ``failed``: how many answers are errors.
    """

    def __init__(self, path: Path, tasks: Sequence[Task]) -> None:
        self._path, self._partial = path, partial_of(path)
        known = {task.custom_id: task.id for task in tasks}
        done, self.failed = set[str](), 0
        for row in self._kept():
            name = row.get("custom_id")
            if known.get(str(name)) != row.get("id") or name in done:
                raise SafeguardError(
                    f"{self._kept_in} holds an answer to {name!r} which is not of this batch, "
                    "model, guard and mode. Name another file with -o"
                )
            done.add(str(name))
            self.failed += is_error(row)
        self.missing = [task for task in tasks if task.custom_id not in done]
        if self.missing and path.exists():
            raise SafeguardError(
                f"{path} exists and has no answer to {self.missing[0].custom_id!r}: name another "
                "file with -o, or remove it"
            )

    @property
    def _kept_in(self) -> Path:
        return self._path if self._path.exists() else self._partial

    def _kept(self) -> Iterator[dict[str, Any]]:
        if not self._kept_in.exists():
            return
        if self._kept_in == self._partial:
            with self._writing():
                drop_torn_line(self._partial)
        if self._kept_in.stat().st_size:
            for _, row in read_rows(self._kept_in, "answers", ("id", "custom_id")):
                yield row

    def add(self, answer: Mapping[str, Any]) -> None:
        """Keep an answer: it is in the file when this returns."""
        line = json.dumps(answer, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._writing(), self._partial.open("ab") as file:
            file.write(line)
        self.failed += is_error(answer)

    def finish(self) -> None:
        """No answer is missing: put the file in place."""
        if self._path.exists():
            return
        with self._writing():
            with self._partial.open("ab") as file:
                os.fsync(file.fileno())
            self._partial.replace(self._path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SafeguardError(f"cannot write {self._path}: {error.strerror}") from error


@contextmanager
def answers(path: Path, tasks: Sequence[Task]) -> Iterator[Answers]:
    """The answers at ``path``, held for this process.

    Raises:
        SafeguardError: another process is at work there, or the file holds answers to something
            else.
    """
    busy = f"another run writes {path}: wait for it or name another file with -o"
    with held(path.with_name(f".{path.name}.lock"), busy):
        yield Answers(path, tasks)


def partial_of(path: Path) -> Path:
    """Where the answers stand until none is missing."""
    return path.with_name(f"{path.name}.partial")


def is_error(answer: Mapping[str, Any]) -> bool:
    """Whether an answer is an error."""
    response = answer.get("response")
    return response is None or response.get("status_code") != 200
