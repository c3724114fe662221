"""Many requests at once: whose answer is whose, the bounds of the queue, deadlines, the end."""

import asyncio
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import uvicorn
from sse_starlette.sse import AppStatus

from tests.server.live import serving, wait_until
from tests.server.raw import connect, head, read_all, status_of
from vlm_safeguard.server.app import _AnswerEvents
from vlm_safeguard.server.conversation import Conversation
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.job import Failed, Job, Sampling


def text_of(answer) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def streamed(live, content, **fields) -> str:
    answer = live.chat(content, stream=True, **fields)
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    told = [json.loads(line) for line in lines[:-1]]
    return "".join(one["choices"][0]["delta"].get("content", "") for one in told)


CHOICES = [
    {"max_tokens": 3},
    {"max_tokens": 17},
    {"max_tokens": 12, "temperature": 1.0, "seed": 7},
    {"max_tokens": 12, "temperature": 2.0, "seed": 7},
    {"max_tokens": 12, "temperature": 1.0, "top_p": 0.3, "seed": 8},
    {"max_tokens": 20, "stop": ["a", "b", "c", "d"]},
    {"max_tokens": 20, "stop": "e"},
]


def test_answers_do_not_depend_on_who_asks_beside(folder):
    """Each answer in a crowd is the one that the same request gets alone."""
    with serving(folder, window=0.1) as live:
        asked = [(f"question {n}", CHOICES[n % len(CHOICES)]) for n in range(21)]
        alone = [text_of(live.chat(content, **how)) for content, how in asked]
        assert len(set(alone)) > 15
        order = list(range(len(asked)))
        random.Random(0).shuffle(order)
        with ThreadPoolExecutor(12) as pool:
            found = dict(
                zip(
                    order,
                    pool.map(
                        lambda n: (
                            streamed(live, asked[n][0], **asked[n][1])
                            if n % 2
                            else text_of(live.chat(asked[n][0], **asked[n][1]))
                        ),
                        order,
                    ),
                    strict=True,
                )
            )
        assert [found[n] for n in range(len(asked))] == alone
        assert live.witness.unguarded == 0


def test_a_full_queue_says_when_to_come_again(folder):
    with serving(folder, batch=1, waiting=2) as live:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: live.chat(f"{n}", max_tokens=40), range(8)))
        statuses = [answer.status_code for answer in answers]
        assert statuses.count(200) >= 3 and statuses.count(429) >= 1
        assert set(statuses) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) > 0
                assert answer.json()["error"]["type"] == "queue_full"
        assert live.witness.unguarded == 0
        counts = live.client.get("/metrics").text
        told = 'responses_total{path="/v1/chat/completions",status="429"} '
        assert f"{told}{float(statuses.count(429))}" in counts


def test_requests_that_are_still_read_count_too(folder):
    """Probes are answered however many bodies are on their way."""
    with serving(folder, batch=1, waiting=1) as live:
        most = live.engine.settings.inside
        held = [connect(live) for _ in range(most)]
        for connection in held:
            connection.sendall(head(100) + b"{")
        assert wait_until(lambda: live.chat().status_code == 429)
        assert live.chat().headers["retry-after"] == "5"
        assert live.client.get("/health").status_code == 200
        assert live.client.get("/ready").status_code == 200
        for connection in held:
            connection.close()
        assert wait_until(lambda: live.chat().status_code == 200)


def test_bodies_together_are_bounded(folder):
    """Those that are still read, and those that are answered."""
    with serving(folder, max_bodies=3000) as live:
        with connect(live) as connection:
            connection.sendall(head(2900) + b" " * 2800)
            assert wait_until(lambda: live.chat("x" * 300).status_code == 429)
            assert live.chat().status_code == 200
        assert wait_until(lambda: live.chat("x" * 300).status_code == 200)
        assert live.chat("x" * 3000).status_code == 429


def test_connections_are_bounded_without_an_error_of_the_server(folder):
    with serving(folder, batch=1, waiting=1) as live:
        most = 8 * live.engine.settings.inside
        held = [connect(live) for _ in range(most + 5)]
        last = connect(live)
        assert read_all(last) == b""  # closed at once
        for connection in (*held, last):
            connection.close()
        assert wait_until(lambda: live.client.get("/health").status_code == 200)


def sizes_of(live) -> list[int]:
    """Rows of each ``generate`` call from now on."""
    sizes = []
    generate = live.engine.loaded.model.generate

    def counting(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    live.engine.loaded.model.generate = counting
    return sizes


# Two parts of one message that write an end token together.
IN_PIECES = [{"type": "text", "text": "</"}, {"type": "text", "text": "s>"}]


@pytest.mark.parametrize(
    ("bad", "sizes"), [("x" * 1500, [3]), (IN_PIECES, [2, 1])], ids=["long", "in pieces"]
)
def test_a_bad_request_does_not_take_the_batch_from_others(folder, bad, sizes):
    with serving(folder, window=2.0, batch=4) as live:
        found = sizes_of(live)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(live.chat, ["a", "b", "c", bad]))
        assert [answer.status_code for answer in answers] == [200] * 3 + [400]
        assert sorted(found, reverse=True) == sizes
        assert live.witness.unguarded == 0


def test_who_left_takes_no_room_in_the_queue(folder):
    with serving(folder, batch=1, waiting=2) as live:
        engine, left, stays = live.engine, [], []
        with engine._changed:  # nobody takes from the queue
            for one in (job(left), job(left)):
                engine.submit(one)
                one.cancelled.set()
            engine.submit(job(stays))
            assert [type(event) for event in left] == [Failed, Failed] and engine.waiting == 1


def test_the_deadline(folder):
    with serving(folder, deadline=1.0) as live:
        answer = live.chat(max_tokens=900)
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "deadline_exceeded"
        assert live.idle(3)
        frames = live.chat(max_tokens=900, stream=True).text
        assert "deadline_exceeded" in frames and "[DONE]" not in frames
        assert live.idle(3)
        assert live.chat(max_tokens=1).status_code == 200


def job(events, pixels=0, deadline=1e9) -> Job:
    told = Conversation([{"role": "user", "content": "hi"}], 0, pixels)
    return Job(told, Sampling(2), deadline, events.append)


def test_waiting_pictures_are_bounded(folder):
    with serving(folder, batch=1, max_waiting_pixels=100) as live:
        engine, events = live.engine, []
        with engine._changed:  # nobody takes from the queue
            for pixels in (1000, 0):  # one alone may be larger, else it could never be answered
                engine._waiting.append(job(events, pixels))
            with pytest.raises(RequestError, match="too many"):
                engine.submit(job(events, 50))


def test_no_request_is_lost_whenever_the_thread_ends(folder):
    """Requests from many threads while the engine ends: each gets an end, or was refused."""
    for _ in range(3):
        with serving(folder, window=0.0) as live:
            jobs, refused = [], []

            def submit(live=live, jobs=jobs, refused=refused):
                for _ in range(30):
                    events = []
                    try:
                        live.engine.submit(job(events))
                    except RequestError as error:
                        refused.append(error)
                    else:
                        jobs.append(events)

            threads = [threading.Thread(target=submit) for _ in range(6)]
            for thread in threads:
                thread.start()
            live.engine.close()
            for thread in threads:
                thread.join()
            assert len(jobs) + len(refused) == 180
            assert all(type(events[-1]).__name__ in ("Done", "Failed") for events in jobs)


@pytest.mark.parametrize("stream", [False, True])
def test_shutdown_finishes_what_was_begun(folder, stream):
    with serving(folder) as live:
        told = []
        thread = threading.Thread(
            target=lambda: told.append(live.chat(max_tokens=250, stream=stream))
        )
        thread.start()
        assert wait_until(lambda: live.engine.busy)
        time.sleep(0.1)
        try:
            uvicorn.Server.handle_exit(live.server, 15, None)  # as SIGTERM does
            thread.join(25)
        finally:
            AppStatus.should_exit = False
        answer = told[0]
        assert answer.status_code == 200
        if stream:
            assert answer.text.rstrip().endswith("data: [DONE]")
        else:
            assert answer.json()["usage"]["completion_tokens"] > 0
        assert live.witness.unguarded == 0
        assert wait_until(lambda: not live.engine.alive)


def test_a_server_that_was_stopped_before_does_not_cut_the_next_ones_streams(folder, monkeypatch):
    monkeypatch.setattr(AppStatus, "should_exit", True)
    with serving(folder) as live:
        answer = live.chat(max_tokens=250, stream=True)
        assert answer.text.rstrip().endswith("data: [DONE]")


def test_a_client_that_left_before_the_first_frame():
    """The stream never began, and its request ends all the same."""
    ended = []

    class Gone:
        def abandon(self):
            ended.append(True)

        def texts(self):
            raise AssertionError("nobody listens")

    class Unused:
        headers: ClassVar[dict[str, str]] = {}

        def first(self):
            return {}

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(1)

    async def run():
        stream = _AnswerEvents(Gone(), Unused(), False)
        await asyncio.wait_for(stream({"type": "http", "method": "POST"}, receive, send), 5)

    asyncio.run(run())
    assert ended


def test_the_last_word_of_a_queue(folder):
    """What waits when the engine closes is told so."""
    with serving(folder) as live:
        events = []
        with live.engine._changed:
            live.engine._waiting.append(job(events))
            live.engine._closing = True
        live.engine.close()
        assert isinstance(events[-1], Failed) and events[-1].error.status == 503


def test_a_pipeline_of_requests(folder):
    """Several requests in one packet get their answers in order."""
    with serving(folder) as live, connect(live) as connection:
        asked = b"".join(
            b"GET %s HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: r%d\r\n%s\r\n"
            % (path, n, b"Connection: close\r\n" if n == 2 else b"")
            for n, path in enumerate([b"/health", b"/v1/models", b"/ready"])
        )
        connection.sendall(asked)
        answer = read_all(connection)
        assert status_of(answer) == 200
        places = [answer.index(b"x-request-id: r%d" % n) for n in range(3)]
        assert places == sorted(places)
