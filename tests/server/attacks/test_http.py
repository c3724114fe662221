"""Attacks on HTTP itself: methods, types, headers, smuggling, slow and half-open clients."""

import json
import time

import pytest

from tests.server import raw
from tests.server.live import wait_until
from tests.server.raw import assert_clear, chat_bytes, connect, head, post, read_all, status_of
from vlm_safeguard.server import listen


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_wrong_methods(live, method):
    answer = live.client.request(method, "/v1/chat/completions")
    assert_clear(answer, 405)
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path",
    [
        "/", "/v1", "/docs", "/redoc", "/v1/chat/completions/", "/v1/completions", "/load_model",
        "/health/", "//health", "/%2e%2e/etc/passwd", "/v1/models/other",
        "/v1/models/..%2f..%2fetc%2fpasswd", "/static/..", "/v1/files",
    ],
)  # fmt: skip
def test_wrong_paths(live, path):
    assert_clear(live.client.get(path), 404, 405)


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/xml", "multipart/form-data; boundary=a", "", "application/x-yaml",
     "application/x-www-form-urlencoded", "image/png", "application/json+x", "a" * 5000],
)  # fmt: skip
def test_wrong_content_types(live, kind):
    assert_clear(post(live, chat_bytes(), content_type=kind), 400)


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate"])
def test_packed_bodies_are_not_unpacked(live, coding):
    import gzip

    assert_clear(post(live, gzip.compress(bytes(1_000_000)), content_encoding=coding), 400)


SMUGGLED = {
    "two lengths": head(5, "Content-Length: 6") + b"hello!",
    "a negative length": head(-1),
    "a length with a sign": head(0).replace(b"Length: 0", b"Length: +5") + b"hello",
    "a length in hex": head(0).replace(b"Length: 0", b"Length: 0x5") + b"hello",
    "a length of 25 digits": head(10**24),
    "an unknown coding": head(0, "Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "two codings": head(0, "Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "space before a colon": head(0).replace(b"Host:", b"Host :"),
    "a folded header": head(0, " folded"),
    "no host": head(2).replace(b"Host: localhost\r\n", b"") + b"{}",
    "a zero byte": head(0, "X: a\x00b"),
    "a bare line feed in a name": head(0, "X\nY: a"),
    "chunks of wrong size": head(0, "Transfer-Encoding: chunked").replace(
        b"Content-Length: 0\r\n", b""
    )
    + b"zz\r\nhello\r\n0\r\n\r\n",
    "HTTP/9": head(0, "Connection: close").replace(b"HTTP/1.1", b"HTTP/9.9"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
    "a long line": b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("kind", SMUGGLED)
def test_smuggling(live, kind):
    with connect(live) as connection:
        connection.sendall(SMUGGLED[kind])
        answer = read_all(connection)
    assert status_of(answer) in (400, 413), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()


def test_a_length_beside_chunks_ends_in_one_answer(live):
    """The chunks count, so that what follows is the next request and not a part of this one."""
    body = chat_bytes()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with connect(live) as connection:
        connection.sendall(head(4, "Transfer-Encoding: chunked", "Connection: close") + chunked)
        answer = read_all(connection)
    assert status_of(answer) in (200, 400)
    assert answer.count(b"HTTP/1.1 ") == 1


def test_ten_thousand_headers(live):
    many = [f"X-{n}: {n}" for n in range(10_000)]
    with connect(live) as connection:
        connection.sendall(head(2, *many, "Connection: close") + b"{}")
        assert status_of(read_all(connection)) == 400


def test_upgrades_are_not_followed(live):
    body = chat_bytes()
    with connect(live) as connection:
        more = ("Connection: Upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Key: AAAA")
        connection.sendall(head(len(body), *more) + body)
        assert status_of(read_all(connection)) in (200, 400, 426)


def test_a_body_larger_than_it_says(live):
    """What is too much is the next request, and that is none."""
    body = chat_bytes()
    with connect(live) as connection:
        connection.sendall(head(len(body)) + body + b"GARBAGE\r\n\r\n")
        answer = read_all(connection)
    assert status_of(answer) == 200
    assert b"HTTP/1.1 400" in answer


def test_a_body_that_is_too_large(live):
    with connect(live) as connection:
        connection.sendall(head(2_000_001))  # refused before it is sent
        assert status_of(read_all(connection)) == 413
    with connect(live) as connection:
        chunked = head(0, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        connection.sendall(chunked)
        try:
            for _ in range(50):
                connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        except OSError:
            pass  # it closed
        answer = read_all(connection)
    assert not answer or status_of(answer) == 413


def test_a_slow_body_is_given_up(live):
    with connect(live) as connection:
        connection.sendall(head(100) + b"{")
        started = time.monotonic()
        answer = read_all(connection)
    assert status_of(answer) == 408
    assert time.monotonic() - started < 10
    assert b"x-request-id" in answer.lower()


def test_slow_headers_are_given_up(live, monkeypatch):
    monkeypatch.setattr(listen, "_HEADER_SECONDS", 0.5)
    for beginning in (b"", b"POST / HTTP/1.1\r\nHost: he"):
        with connect(live) as connection:
            connection.sendall(beginning)
            assert read_all(connection) == b""
    # Also behind a first request of the same connection.
    with connect(live) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"POST / HTT")
        answer = read_all(connection)
    assert status_of(answer) == 200
    assert answer.count(b"HTTP/1.1 ") == 1


def test_patient_requests_are_not_cut_off(live, monkeypatch):
    """The timer is for headers: a slower answer, and an idle connection, are left alone."""
    monkeypatch.setattr(listen, "_HEADER_SECONDS", 0.3)
    body = chat_bytes(max_tokens=60)
    with connect(live) as connection:
        connection.sendall(head(len(body)) + body[:20])
        time.sleep(0.6)
        connection.sendall(body[20:])
        connection.settimeout(20)
        assert status_of(connection.recv(65536)) == 200
        time.sleep(0.6)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert status_of(read_all(connection)) == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("abrupt", [False, True])
def test_a_client_that_leaves_frees_its_row(live, stream, abrupt):
    """1,400 tokens take many seconds. The client leaves in the middle, and the row is free."""
    body = chat_bytes(max_tokens=900, stream=stream)
    connection = connect(live)
    connection.sendall(head(len(body)) + body)
    assert wait_until(lambda: live.engine.busy)
    time.sleep(0.2)
    if abrupt:
        connection.setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # SO_LINGER: reset
    before = live.witness.guarded
    connection.close()
    assert live.idle(5)
    assert live.witness.guarded - before < 600
    last = json.loads(live.audit.read_text().splitlines()[-1])
    assert last["outcome"] == "cancelled"


def test_a_client_that_never_sends(live):
    for _ in range(20):
        connect(live).close()
    with connect(live) as connection:
        connection.sendall(head(100) + b"{")  # and leaves in the middle of the body
    assert live.client.get("/health").status_code == 200


def test_half_closed(live):
    """A client that closes its side has left."""
    body = chat_bytes()
    with connect(live) as connection:
        connection.sendall(head(len(body)) + body)
        connection.shutdown(1)
        read_all(connection)
    assert live.idle()


def test_every_answer_names_its_request(live):
    for method, path in [
        ("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/v1/models"),
        ("GET", "/openapi.json"), ("GET", "/nowhere"), ("POST", "/health"),
        ("POST", "/v1/moderations"),
    ]:  # fmt: skip
        answer = live.client.request(method, path, headers={"X-Request-Id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
    assert raw.post(live, b"{").headers["x-request-id"]
