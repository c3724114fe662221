"""Guards on a model hub, against a local stand-in that speaks the hub's endpoints."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import fuzz, tiny
from tests.artifact import hub_server
from tests.command import run
from vlm_safeguard.artifact import hub as hub_module
from vlm_safeguard.artifact.model_card import CARD_FILE
from vlm_safeguard.cli.commands import app
from vlm_safeguard.errors import GuardError
from vlm_safeguard.guard import CONFIG_FILE, TENSOR_FILE, Guard

NAME = "someone/a-guard"
FILES = {CONFIG_FILE, TENSOR_FILE, CARD_FILE}


@pytest.fixture(autouse=True)
def no_lookup_elsewhere(monkeypatch, tmp_path):
    """An endpoint that is not given is a closed port; no token of this machine is used."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    address = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub():
    with hub_server.hub() as state:
        yield state


@pytest.fixture
def guard():
    return Guard.from_bytes(*fuzz.sound("restore"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def stored(hub, files, name=NAME):
    """Put files into a repository of the stand-in; returns the commit."""
    settings, blob = files
    repository = hub.repositories.setdefault(name, hub_server.Repository())
    return repository.commit({CONFIG_FILE: settings, TENSOR_FILE: blob})


def same(one, other):
    return one.config == other.config and all(
        tensor.equal(other.tensors[name]) for name, tensor in one.tensors.items()
    )


# -- there and back ------------------------------------------------------------------------------


def test_push_then_load(hub, guard, cache):
    address = guard.push_to_hub(NAME, token="secret", private=True, endpoint=hub.endpoint)
    repository = hub.repositories[NAME]
    assert address == f"{hub.endpoint}/{NAME}/commit/{repository.branches['main']}"
    assert repository.private is True
    assert set(repository.files("main")) == FILES | {".gitattributes"}
    assert set(hub.tokens) == {"Bearer secret"}
    loaded = Guard.from_pretrained(NAME, endpoint=hub.endpoint, cache_dir=cache)
    assert same(loaded, guard)
    page = repository.files("main")[CARD_FILE].decode()
    assert f'Guard.from_pretrained("{NAME}")' in page


def test_pushing_again_adds_a_commit(hub, guard, cache):
    guard.push_to_hub(NAME, endpoint=hub.endpoint)
    first = hub.repositories[NAME].branches["main"]
    newer = Guard.from_bytes(*fuzz.sound("restore", seed=1))
    newer.push_to_hub(NAME, endpoint=hub.endpoint)
    options = {"endpoint": hub.endpoint, "cache_dir": cache}
    assert same(Guard.from_pretrained(NAME, **options), newer)
    assert same(Guard.from_pretrained(NAME, revision=first, **options), guard)


def test_save_pretrained_pushes_when_told_to(hub, guard, tmp_path):
    target = tmp_path / "my-guard"
    assert guard.save_pretrained(target) is None
    assert hub.requests == []
    address = guard.save_pretrained(target, push_to_hub=True, endpoint=hub.endpoint)
    assert "/someone/my-guard/commit/" in address
    assert set(hub.repositories) == {"someone/my-guard"}
    guard.save_pretrained(target, push_to_hub=True, repo_id=NAME, endpoint=hub.endpoint)
    assert NAME in hub.repositories
    with pytest.raises(GuardError, match="push_to_hub=True"):
        guard.save_pretrained(target, repo_id=NAME)


def test_branches_and_pull_requests(hub, guard):
    guard.push_to_hub(NAME, endpoint=hub.endpoint)
    repository = hub.repositories[NAME]
    before = repository.branches["main"]
    guard.push_to_hub(NAME, create_pr=True, endpoint=hub.endpoint)
    assert repository.branches["main"] == before and "refs/pr/1" in repository.branches
    with pytest.raises(GuardError, match="no revision 'nowhere'"):
        guard.push_to_hub(NAME, branch="nowhere", endpoint=hub.endpoint)


def test_erase_is_never_pushed(hub, guard):
    steering = guard.config.steering.model_copy(update={"mode": "erase"})
    eraser = tiny.changed(guard, steering=steering)
    with pytest.raises(GuardError, match="never"):
        eraser.push_to_hub(NAME, endpoint=hub.endpoint)
    assert hub.requests == []


# -- the cache -----------------------------------------------------------------------------------


def test_local_files_only_takes_the_cache_and_asks_nothing(hub, guard, cache):
    commit = stored(hub, fuzz.sound("restore"))
    options = {"endpoint": hub.endpoint, "cache_dir": cache}
    with pytest.raises(GuardError, match="not in the cache"):
        Guard.from_pretrained(NAME, local_files_only=True, **options)
    assert hub.requests == []
    Guard.from_pretrained(NAME, **options)
    hub.requests.clear()
    for revision in (None, "main", commit):
        again = Guard.from_pretrained(NAME, revision=revision, local_files_only=True, **options)
        assert same(again, guard)
    assert same(Guard.from_pretrained(NAME, revision=commit, **options), guard)  # it is exact
    assert hub.requests == []


def test_offline_mode_takes_the_cache(hub, guard, cache, monkeypatch):
    stored(hub, fuzz.sound("restore"))
    options = {"endpoint": hub.endpoint, "cache_dir": cache}
    Guard.from_pretrained(NAME, **options)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(Guard.from_pretrained(NAME, **options), guard)
    with pytest.raises(GuardError, match="HF_HUB_OFFLINE"):
        Guard.from_pretrained("someone/another", **options)
    assert hub.requests == []


def test_what_is_cached_is_not_fetched_twice(hub, cache):
    stored(hub, fuzz.sound("restore"))
    options = {"endpoint": hub.endpoint, "cache_dir": cache}
    Guard.from_pretrained(NAME, **options)
    hub.requests.clear()
    Guard.from_pretrained(NAME, **options)
    assert not [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    Guard.from_pretrained(NAME, force_download=True, **options)
    fetched = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(fetched) == 2


def test_a_snapshot_folder_of_the_cache_is_a_guard_folder(hub, guard, cache):
    """Its files are links to the cache's blobs."""
    commit = stored(hub, fuzz.sound("restore"))
    Guard.from_pretrained(NAME, endpoint=hub.endpoint, cache_dir=cache)
    (snapshot,) = cache.glob(f"*/snapshots/{commit}")
    assert same(Guard.from_pretrained(snapshot), guard)


# -- which names are looked up -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "guard", "./someone/a-guard", "/someone/a-guard", "~/a-guard", "~nobody-here/x", "a/b/c",
        "someone/", "someone/..", "..", "some--one/x", "someone/a guard", "someone\\a-guard",
        "C:/x", "https://x/y", "", "x\x00/y", "someone/" + "a" * 200, Path("someone/a-guard"),
    ],
    ids=lambda name: ascii(str(name))[:30],
)  # fmt: skip
def test_a_path_is_never_looked_up(hub, name):
    with pytest.raises(GuardError, match="cannot load the guard"):
        Guard.from_pretrained(name, endpoint=hub.endpoint)
    assert hub.requests == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dead link"])
def test_what_exists_is_never_looked_up(hub, guard, tmp_path, kind):
    place = tmp_path / NAME
    place.parent.mkdir()
    if kind == "folder":
        guard.save_pretrained(place)
        assert same(Guard.from_pretrained(NAME, endpoint=hub.endpoint), guard)
    else:
        {
            "empty folder": place.mkdir,
            "file": place.touch,
            "dead link": lambda: place.symlink_to("no"),
        }[kind]()
        with pytest.raises(GuardError):
            Guard.from_pretrained(NAME, endpoint=hub.endpoint)
    assert hub.requests == []


def test_a_revision_of_a_folder_is_refused(hub, guard, tmp_path):
    guard.save_pretrained(tmp_path / "here")
    with pytest.raises(GuardError, match="revision"):
        Guard.from_pretrained(tmp_path / "here", revision="main")


# -- errors --------------------------------------------------------------------------------------


def load_error(hub, cache, name=NAME, **options):
    with pytest.raises(GuardError) as caught:
        Guard.from_pretrained(name, endpoint=hub.endpoint, cache_dir=cache, **options)
    return str(caught.value)


def test_no_such_repository(hub, cache):
    said = load_error(hub, cache)
    assert f"no repository {NAME}" in said and "hf auth login" in said


def test_no_such_revision(hub, cache):
    stored(hub, fuzz.sound("restore"))
    assert "no revision 'v9'" in load_error(hub, cache, revision="v9")
    assert "no revision" in load_error(hub, cache, revision="0" * 40)


def test_a_gated_repository(hub, cache):
    stored(hub, fuzz.sound("restore"))
    hub.repositories[NAME].gated = True
    assert "must be granted" in load_error(hub, cache)


@pytest.mark.parametrize("missing", [CONFIG_FILE, TENSOR_FILE])
def test_a_repository_without_a_guard(hub, cache, missing):
    stored(hub, fuzz.sound("restore"))
    del hub.repositories[NAME].files("main")[missing]
    assert f"{missing} is missing" in load_error(hub, cache)


def test_no_network(cache):
    with pytest.raises(GuardError, match=r"cannot be reached.*local_files_only"):
        Guard.from_pretrained(NAME, endpoint="http://127.0.0.1:1", cache_dir=cache)


def test_no_network_does_not_fall_back_to_the_cache_silently(hub, cache):
    stored(hub, fuzz.sound("restore"))
    Guard.from_pretrained(NAME, endpoint=hub.endpoint, cache_dir=cache)
    with pytest.raises(GuardError, match="local_files_only"):
        Guard.from_pretrained(NAME, endpoint="http://127.0.0.1:1", cache_dir=cache)


def test_a_hub_that_does_not_answer(cache, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        repository = hub_module.Repository(NAME, cache_dir=cache, endpoint=endpoint, timeout=0.3)
        with pytest.raises(GuardError, match="did not answer in time"):
            repository.read(CONFIG_FILE, 1000)


@pytest.mark.parametrize(("status", "said"), [(500, "status 500"), (403, "token"), (418, "418")])
def test_a_hub_that_fails(hub, cache, status, said):
    stored(hub, fuzz.sound("restore"))
    hub.status = status
    assert said in load_error(hub, cache)


def test_a_server_that_is_no_hub(hub, cache):
    hub.status = 200  # JSON of another kind
    assert "cannot" in load_error(hub, cache)


def test_no_right_to_push(hub, guard):
    hub.writers = {"right"}
    with pytest.raises(GuardError, match="hf auth login"):
        guard.push_to_hub(NAME, token="wrong", endpoint=hub.endpoint)
    guard.push_to_hub(NAME, token="right", endpoint=hub.endpoint)


@pytest.mark.parametrize("name", ["a/b/c", "bad name", "", "-x", "someone/.."])
def test_a_name_that_is_no_repository_is_not_pushed_to(hub, guard, name):
    with pytest.raises(GuardError, match="owner/name"):
        guard.push_to_hub(name, endpoint=hub.endpoint)
    assert not hub.repositories


# -- a hostile repository ------------------------------------------------------------------------


def test_a_file_that_is_too_large_is_not_downloaded(hub, cache):
    stored(hub, fuzz.sound("restore"))
    for name in (TENSOR_FILE, CONFIG_FILE):
        hub.sizes = {name: 10 << 30}
        hub.requests.clear()
        assert "was not downloaded" in load_error(hub, cache)
        assert not [path for _, path in hub.requests if path.endswith(name)]


def test_a_hub_that_understates_a_size(hub, cache):
    settings, blob = fuzz.sound("restore")
    stored(hub, (settings + b" " * (2 << 20), blob))
    hub.sizes = {CONFIG_FILE: 10}
    assert "larger" in load_error(hub, cache)


def test_a_changed_guard_is_refused(hub, cache):
    settings, blob = fuzz.sound("restore")
    stored(hub, (settings, blob[:-1] + bytes([blob[-1] ^ 1])))
    assert "digest" in load_error(hub, cache)


def test_a_repository_that_changes_meanwhile_is_never_mixed(hub, cache):
    stored(hub, fuzz.sound("restore"))
    settings, blob = fuzz.sound("restore", seed=1)
    hub.moves = [(NAME, {CONFIG_FILE: settings, TENSOR_FILE: blob})]
    assert "changed on the hub" in load_error(hub, cache)
    assert same(
        Guard.from_pretrained(NAME, endpoint=hub.endpoint, cache_dir=cache),
        Guard.from_bytes(settings, blob),
    )


def test_code_and_pickles_in_a_repository_are_not_touched(hub, cache):
    stored(hub, fuzz.sound("restore"))
    hub.repositories[NAME].commit({"modeling.py": b"raise SystemExit", "x.pkl": b"cos\nsystem"})
    Guard.from_pretrained(NAME, endpoint=hub.endpoint, cache_dir=cache)
    fetched = {path.rsplit("/", 1)[-1] for _, path in hub.requests if "/resolve/" in path}
    assert fetched == {CONFIG_FILE, TENSOR_FILE}


# -- the command ---------------------------------------------------------------------------------


def test_push_command(hub, guard, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    guard.save_pretrained(tmp_path / "g")
    options = ["--private", "--base-model", "org/vlm", "--json"]
    done = run("push", "g", NAME, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories[NAME]
    said = json.loads(done.stdout)
    assert said == {"commit": f"{hub.endpoint}/{NAME}/commit/{repository.branches['main']}"}
    assert repository.private is True and set(repository.files("main")) >= FILES
    assert "base_model: org/vlm" in repository.files("main")[CARD_FILE].decode()


def test_push_command_checks_the_guard_first(hub, guard, tmp_path):
    guard.save_pretrained(tmp_path / "g")
    (tmp_path / "g" / TENSOR_FILE).write_bytes(b"")
    done = CliRunner().invoke(app, ["push", "g", NAME])
    assert isinstance(done.exception, GuardError) and "digest" in str(done.exception)
    assert done.stdout == ""
