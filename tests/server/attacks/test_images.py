"""Pictures that attack: each is refused in our words, or read under guard."""

import base64
import io
import threading
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.server.attacks import pictures
from tests.server.attacks.pictures import part, png, uri
from tests.server.live import serving
from tests.server.raw import assert_clear
from vlm_safeguard.data.ocr import Reader
from vlm_safeguard.model import chat
from vlm_safeguard.server import conversation

REFUSED, ACCEPTED = pictures.refused(), pictures.accepted()


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused(live, kind):
    error = assert_clear(live.chat([part(uri(REFUSED[kind]))]), 400)
    assert error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("kind", ACCEPTED)
def test_it_is_read_under_guard(live, kind):
    answer = live.chat([{"type": "text", "text": "what is it?"}, part(uri(ACCEPTED[kind]))])
    assert answer.status_code == 200
    assert answer.json()["safeguard"]["pictures"]["reached_model"] == 1
    assert answer.headers["x-safeguard-status"] == "guarded"


def test_pictures_whose_words_are_read(folder):
    """With OCR, as under the guard that ships: refused or read, and each counted."""
    with serving(folder, reads_pictures=True) as live:
        for picture in ACCEPTED.values():
            answer = live.chat([{"type": "text", "text": "what is it?"}, part(uri(picture))])
            told = answer.json()["safeguard"]["pictures"]
            assert told == {"sent": 1, "reached_model": 1, "words_read": 1}
        for picture in REFUSED.values():
            assert_clear(live.chat([part(uri(picture))]), 400)
        assert live.idle() and live.witness.unguarded == 0


def as_png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_words_are_read_before_the_request_waits(folder, monkeypatch):
    """Not by the thread that runs the model, which finds them read."""
    threads = []

    class Engine:
        def __call__(self, pixels):
            threads.append(threading.current_thread().name)
            return SimpleNamespace(txts=["a bomb"], scores=[1.0])

    made = Reader(Engine())
    for module in (conversation, chat):
        monkeypatch.setattr(module, "reader", lambda: made)
    two = [Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")]
    for picture in two:
        picture.putpixel((3, 3), (0, 0, 0))
    with serving(folder, reads_pictures=True) as live:
        answer = live.chat([part(uri(as_png(picture))) for picture in two])
        assert answer.json()["safeguard"]["pictures"]["words_read"] == 2
    assert len(threads) == 2 and "inference" not in threads


def test_a_comment_that_unpacks_to_100_megabytes(live):
    answer = live.chat([part(uri(pictures.text_bomb()))])
    assert answer.status_code == 200 or assert_clear(answer, 400)


@pytest.mark.parametrize("kind", ["jpeg", "webp", "jpg"])
def test_the_type_in_the_address_means_nothing(live, kind):
    assert live.chat([part(uri(png(), kind))]).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        "%",
        "iVBORw0KGgo",
        "iVBO Rw0=",
        "iVBORw0=\n",
        "====",
        "A",
        "é",
        "iVBORw0KGgo=garbage=",
        "\x00",
    ],
)
def test_bad_base64(live, data):
    assert_clear(live.chat([part("data:image/png;base64," + data)]), 400)


def test_huge_base64_is_refused_by_its_size(live):
    url = "data:image/png;base64," + "A" * 2_100_000
    assert_clear(live.chat([part(url)]), 413)


def test_more_pictures_than_allowed(live):
    assert_clear(live.chat([part(uri(png()))] * 5), 400)


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_show_pictures(live, role):
    told = [{"role": role, "content": [part(uri(png()))]}, {"role": "user", "content": "hi"}]
    assert_clear(live.chat(messages=told), 400)


ADDRESSES = [
    "http://127.0.0.1/a.png", "https://example.com/a.png", "http://[::1]/a.png",
    "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/",
    "http://169.254.169.254/latest/meta-data/", "http://localhost@example.com/",
    "http://example.com#@127.0.0.1/", "//example.com/a.png", "HTTP://EXAMPLE.COM/A.PNG",
    "file:///etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd", "ftp://127.0.0.1/",
    "gopher://127.0.0.1:6379/_INFO", "dict://127.0.0.1:11211/", "ldap://127.0.0.1/",
    "jar:http://a!/b", "blob:http://a/b", "javascript:alert(1)", "/etc/passwd", "../../etc/passwd",
    "~/.ssh/id_rsa", "C:\\Windows\\win.ini", "\\\\host\\share\\a.png", "a.png", "", " ", "data:",
    "data:,hi", "data:text/html;base64,PGI+", "data:image/svg+xml;base64,PHN2Zy8+",
    "data:image/gif;base64,R0lGODlh", "data:image/png,raw",
    "data:image/png;charset=utf-8;base64,AA",
    "data:application/octet-stream;base64,AAAA", " data:image/png;base64,AAAA",
    "data:image/png;base64 ,AAAA", "url(data:image/png;base64,AAAA)",
    "data:image/png;base64;base64,AAAA", "http://a/data:image/png;base64,AAAA",
]  # fmt: skip


@pytest.fixture
def no_connections(monkeypatch):
    """Fails if anything but the test itself opens a connection or a file named by a request."""

    def refuse(*args, **_):
        raise AssertionError(f"a connection to {args}")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("vlm_safeguard.data.image_io._read", refuse)


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_address_is_followed(live, no_connections, address):
    error = assert_clear(live.chat([part(address)]), 400)
    assert "data URIs only" in error["message"]


def test_a_refusal_does_not_repeat_the_address(live):
    answer = live.chat([part("http://secret-host.internal/?token=abcdef")])
    assert "secret-host" not in answer.text


def test_base64_that_is_an_address(live):
    hidden = base64.b64encode(b"http://127.0.0.1/a.png").decode()
    assert_clear(live.chat([part("data:image/png;base64," + hidden)]), 400)
