"""Downloads the paper's three public sets from their publishers, on request.

Every file is taken at a fixed commit of its publisher's repository. Tables are checked against
their digests; pictures are what that commit holds. A set is in the cache whole or not at all.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import urlopen

from vlm_safeguard.embedded.assemble import default_cache
from vlm_safeguard.errors import DataError
from vlm_safeguard.evaluation.benchmarks import BENCHMARKS, benchmark_of

HUB = "hub"
SERVER = "https://raw.githubusercontent.com"
TIMEOUT = 30.0  # seconds to wait for each answer
MAX_BYTES = 20_000_000  # of one file


@dataclass(frozen=True)
class Source:
    """Files of a repository at a commit: tables by path with their SHA-256, and pictures."""

    repository: str
    commit: str
    tables: dict[str, str]
    pictures: tuple[str, ...] = ()


SOURCES = {
    "malicious_instruct": Source(
        "Princeton-SysML/Jailbreak_LLM",
        "1e490531c0ef4bc13430178bf1fbc8f813e34b1a",
        {
            "data/MaliciousInstruct.txt": (
                "a64d69dd1004aac4a23aaff3748fb8f17161893f74db36f45b8bc849eb1bcce5"
            )
        },
    ),
    "jailbreak_instructions": Source(
        "thu-coai/JailbreakDefense_GoalPriority",
        "c25aee94c55acaf26dd0e898cb94ace840138926",
        {
            "data/test/harmful_questions.json": (
                "32d17797c36d2a6d1a4fae5e61383e306dfcc681b678d78c2886f94105f1ff20"
            ),
            "data/test/jailbreak_templates.json": (
                "777d35ceef97cebea2ed7f964fc43f4928b385f643241263f1f39315b0baefc5"
            ),
        },
    ),
    "mm_harmful_bench": Source(
        "Jihuai-wpy/InferAligner",
        "882e8fbbffe94518b21d69d699bef0f0f1729645",
        {
            "MM-HarmfulBench/mm_harmful.jsonl": (
                "7b8902fc28bf4b0379f05b24ade2bc164fea1e988de21433348056376169b3d9"
            )
        },
        tuple(f"MM-HarmfulBench/images/{n}.jpg" for n in range(100)),
    ),
}


def folder_of(benchmark: str, data: str | None) -> Path | None:
    """Where the files of a benchmark lie; None for what ships with the package.

    Args:
        data: a folder; or ``hub``, which fetches the benchmark into the cache if it is not there
            (a folder called so is named by its whole path).

    Raises:
        DataError: see ``fetch``.
    """
    if not data or not benchmark_of(benchmark).files:
        return None
    return fetch(benchmark) if data == HUB else Path(data)


def fetch(name: str, cache: Path | None = None) -> Path:
    """The folder of a public set, laid out as in its publisher's repository.

    Goes to the network only if the set is not in ``cache`` (see ``assemble.default_cache``) yet.

    Raises:
        DataError: not a set that can be fetched, no network, a file that is missing, too large or
            has another digest, or no room on the disk. Nothing is left behind then.
    """
    if name not in SOURCES:
        raise DataError(
            f"{name} is not fetched: only {', '.join(SOURCES)} are. Get its files from their "
            "publisher and name the folder with --data"
        )
    source = SOURCES[name]
    place = (default_cache() if cache is None else cache) / "benchmarks"
    folder = place / f"{name}-{source.commit[:12]}"
    if folder.is_dir():
        return folder
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=f".{name}-") as temporary:
            whole = Path(temporary) / "whole"
            for path in (*source.tables, *source.pictures):
                data = _download(name, source, path)
                target = whole / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process may have finished first
                    raise
    except OSError as error:
        raise DataError(
            f"cannot write {name} to {place}: {error.strerror or error}. Make room or set "
            "VLM_SAFEGUARD_CACHE to a folder that can be written"
        ) from error
    return folder


def _download(name: str, source: Source, path: str) -> bytes:
    """One file, checked; every failure is a ``DataError`` that names its address."""
    address = f"{SERVER}/{source.repository}/{source.commit}/{quote(path)}"
    way_out = f"or get {name} from {BENCHMARKS[name].publisher} and name its folder with --data"
    try:
        with urlopen(address, timeout=TIMEOUT) as answer:
            data: bytes = answer.read(MAX_BYTES + 1)
            missing = answer.length  # of what was announced
    except HTTPError as error:
        raise DataError(f"{address} answered {error.code}: try again later, {way_out}") from error
    except (HTTPException, URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"cannot fetch {address} ({reason}): check the network, {way_out}"
        ) from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{address} is larger than {MAX_BYTES} bytes: {way_out[3:]}")
    if missing or not data:
        raise DataError(f"{address} broke off after {len(data)} bytes: try again, {way_out}")
    expected = source.tables.get(path)
    found = hashlib.sha256(data).hexdigest()
    if expected is not None and found != expected:
        raise DataError(f"{address} has SHA-256 {found}, expected {expected}: try again, {way_out}")
    return data
