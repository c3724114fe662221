"""Downloads guards from the Hugging Face hub and pushes them to it.

The network is used only for a repository that the caller names. Every failure is a ``GuardError``
that says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    errors,
    is_offline_mode,
    try_to_load_from_cache,
)

from vlm_safeguard.errors import GuardError
from vlm_safeguard.utils.files import read_limited

LIBRARY = "vlm-safeguard"
TIMEOUT = 10.0  # seconds to wait for the hub's first answer

# "owner/name" as the hub allows it; anything else is a path.
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repository(name: str) -> bool:
    """Whether ``name`` has the form "owner/name" and is not a path."""
    return bool(_REPOSITORY.fullmatch(name)) and ".." not in name and "--" not in name


@dataclass
class Repository:
    """Reads files of a hub repository, all at one commit, each with a size limit.

    The size that the hub states is checked before a download. The network is not used with
    ``local_files_only``, with ``HF_HUB_OFFLINE``, or if ``revision`` is a commit that is in the
    cache. If the hub cannot be reached, reading fails: a cached guard is not used instead.
    """

    repo_id: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False
    endpoint: str | None = None
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        self._api = HfApi(endpoint=self.endpoint, token=self.token, library_name=LIBRARY)
        self._sizes: dict[str, int | None] = {}
        self._commit: str | None = None  # as the hub has it, once asked

    def read(self, name: str, limit: int) -> bytes:
        """Read one file.

        Raises:
            GuardError: the repository, revision or file does not exist, the file is larger than
                ``limit`` bytes, access is denied, or the hub does not answer.
        """
        offline = self.local_files_only or is_offline_mode() or self._is_cached(name)
        # The first file is asked for by the revision's own name, so that the cache learns where
        # it points and local_files_only finds it; the others at the commit that was found.
        revision = self.revision
        if not offline and self._commit is None:
            self._look_up()
        elif not offline:
            revision = self._commit
        if not offline:
            self._check_size(name, limit)
        with _explained(self.repo_id, self.revision, self._api.endpoint):
            path = self._api.hf_hub_download(
                self.repo_id,
                name,
                revision=revision,
                cache_dir=self.cache_dir,
                force_download=self.force_download and not offline,
                local_files_only=offline,
                etag_timeout=self.timeout,
            )
        if self._commit and Path(path).parent.name != self._commit:
            raise GuardError("the guard changed on the hub during the download: load it again")
        try:
            return read_limited(Path(path), limit)
        except OSError as error:
            raise GuardError(f"cannot read {name} in the cache: {error.strerror}") from error

    def _look_up(self) -> None:
        with _explained(self.repo_id, self.revision, self._api.endpoint):
            info = self._api.model_info(
                self.repo_id, revision=self.revision, files_metadata=True, timeout=self.timeout
            )
        self._commit = info.sha
        self._sizes = {file.rfilename: file.size for file in info.siblings or []}

    def _check_size(self, name: str, limit: int) -> None:
        if name not in self._sizes:
            raise GuardError(f"not a guard repository: {name} is missing")
        size = self._sizes[name]
        if size is not None and size > limit:
            raise GuardError(
                f"{name} has {size} bytes on the hub, larger than the {limit} allowed, and was not "
                "downloaded"
            )

    def _is_cached(self, name: str) -> bool:
        """Whether ``revision`` is a commit and its file is in the cache."""
        if self.force_download or not _COMMIT.fullmatch(self.revision or ""):
            return False
        found = try_to_load_from_cache(
            self.repo_id, name, cache_dir=self.cache_dir, revision=self.revision
        )
        return isinstance(found, str)


def push(
    repo_id: str,
    files: dict[str, bytes],
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
) -> str:
    """Push ``files`` to a repository in one commit. The repository is created if needed.

    Returns:
        The address of the commit.

    Raises:
        GuardError: the branch does not exist, write access is denied, or the hub does not answer.
    """
    api = HfApi(endpoint=endpoint, token=token, library_name=LIBRARY)
    with _explained(repo_id, branch, api.endpoint):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


@contextmanager
def _explained(repo_id: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into a ``GuardError`` that says what to do."""
    at = f"{repo_id} at {revision}" if revision else repo_id
    try:
        yield
    except errors.GatedRepoError as error:
        raise GuardError(
            f"access to {repo_id} must be granted first: ask for it on {endpoint}/{repo_id} and "
            "log in with `hf auth login` or give a token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise GuardError(
            f"{repo_id} has no revision {revision!r}: name a branch, tag or commit of it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise GuardError(
            f"there is no repository {repo_id} on {endpoint}, or it is private: check the name, "
            "log in with `hf auth login` or give a token. A folder is named with ./ before it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise GuardError(
            f"{at} is not in the cache and cannot be downloaded: load it "
            "once with a network connection, without local_files_only and HF_HUB_OFFLINE"
        ) from error
    except errors.HFValidationError as error:
        raise GuardError(f"{repo_id!r} is not a repository name: use owner/name") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise GuardError(
                f"{endpoint} does not allow this with {repo_id} (status {status}): give a token "
                "with the right to, or log in with `hf auth login`"
            ) from error
        raise GuardError(
            f"{endpoint} answered with status {status} for {repo_id}: try again later"
        ) from error
    except GuardError:
        raise
    except Exception as error:  # the HTTP client's own kinds differ between its versions
        what = "did not answer in time" if _is_timeout(error) else "cannot be reached"
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise GuardError(
            f"{endpoint} {what} ({reason}): check the network. To use a guard from the cache, pass "
            "local_files_only=True"
        ) from error


def _is_timeout(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or "Timeout" in type(error).__name__
