"""Who may ask, who sees what the gates say, and what the modes answer."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.live import serving
from tests.server.raw import connect, head, read_all, status_of

KEYS = {"api_keys": frozenset({"asks"}), "trusted_keys": frozenset({"sees", "s\u00e9es"})}
PATHS = [
    ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"), ("GET", "/health/"), ("GET", "/health%2f"), ("GET", "//ready"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/moderations"), ("OPTIONS", "/v1/models"),
]  # fmt: skip


@pytest.fixture(scope="module")
def live(folder):
    with serving(folder, mode="refuse", refusal="No.", **KEYS) as server:
        yield server


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {}, key("other"), key("ask"), key("askss"), key("asks,sees"), key("ASKS"),
        {"Authorization": "Basic YXNrczo="}, {"Authorization": "asks"},
        {"Authorization": "Bearer"}, {"X-API-Key": "asks"},
        {"Authorization": b"Bearer \xff\xfe"}, {"Cookie": "key=asks"},
    ],
    ids=str,
)  # fmt: skip
def test_no_key_no_answer(live, method, path, headers):
    answer = live.client.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


def test_the_body_of_a_stranger_is_not_read(live):
    answer = live.client.post("/v1/chat/completions", content=b"[" * 1_000_000)
    assert answer.status_code == 401


def test_the_key_is_checked_before_any_body_comes(live):
    with connect(live) as connection:
        connection.sendall(head(1000))
        assert status_of(read_all(connection)) == 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_need_no_key(live, path):
    assert live.client.get(path).status_code == 200


def test_bodies_of_probes_are_not_read_and_take_no_room(live):
    """However many strangers send half of one."""
    for path in ("/health", "/ready"):
        held = [connect(live) for _ in range(live.engine.settings.inside + 2)]
        for connection in held:
            connection.sendall(head(10**7, path=path) + b"{")
        assert live.chat(headers=key("asks")).status_code == 200
        for connection in held:
            answer = read_all(connection)
            assert status_of(answer) in (200, 405) and b"connection: close" in answer.lower()
            connection.close()


def test_scores_are_for_trusted_keys(live):
    told = live.chat(headers=key("asks")).json()["safeguard"]
    assert set(told) == {"status", "mode", "pictures"}
    told = live.chat(headers=key("sees")).json()["safeguard"]
    assert (
        told["fired"] is True
        and told["gates"] == ["text", "vlm"]
        and told["scores"]["text.0"][0] > 0
    )


def test_scores_in_a_stream_are_for_trusted_keys(live):
    for name, seen in (("asks", False), ("sees", True)):
        answer = live.chat(headers=key(name), stream=True)
        assert ("scores" in answer.text) == ("fired" in answer.text) == seen


@pytest.mark.parametrize("path", ["/metrics", "/v1/moderations"])
def test_counts_and_moderation_are_for_trusted_keys(live, path):
    method, body = ("GET", None) if path == "/metrics" else ("POST", {"input": "hi"})
    assert live.client.request(method, path, json=body, headers=key("asks")).status_code == 403
    assert live.client.request(method, path, json=body, headers=key("sees")).status_code == 200


def test_refuse_mode_generates_nothing(live):
    before = live.witness.guarded
    answer = live.chat(headers=key("asks"), max_tokens=50).json()
    assert answer["choices"][0]["message"]["content"] == "No."
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    assert live.witness.guarded - before == 1  # the prompt was read, which decided
    assert live.witness.unguarded == 0


def test_monitor_says_so(folder):
    with serving(folder, mode="monitor") as live:
        answer = live.chat()
        assert answer.headers["x-safeguard-status"] == "monitor"
        assert answer.json()["safeguard"]["status"] == "monitor"
        assert answer.json()["safeguard"]["fired"] is True
        for path in ("/ready", "/health", "/metrics", "/v1/models", "/nowhere"):
            assert live.client.get(path).headers["x-safeguard-mode"] == "monitor"
        # The witness sees what a guard that only watches leaves alone.
        assert live.witness.unguarded == 4 and live.witness.guarded == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ],
)
def test_without_keys_no_page_of_another_site_may_ask(shared, headers):
    """A site can lead its name to 127.0.0.1, and any page can send requests there."""
    assert shared.chat(headers=headers).status_code == 403
    own = {"Host": f"localhost:{shared.port}", "Origin": f"http://localhost:{shared.port}"}
    assert shared.chat(headers=own).status_code == 200


def test_requests_within_the_window_share_a_batch(folder):
    """The first waits for others until the window ends or the batch is full."""
    with serving(folder, window=2.0, batch=3) as live:
        sizes = []
        generate = live.engine._generate
        live.engine._generate = lambda jobs: (sizes.append(len(jobs)), generate(jobs))[1]
        with ThreadPoolExecutor(3) as pool:
            replies = list(pool.map(lambda n: live.chat(f"{n}"), range(3)))
    assert [reply.status_code for reply in replies] == [200] * 3
    assert sizes == [3]
