"""`python -m bench.serving`: throughput and latency of the server, guarded and not.

Three servers share one model in turn: guarded, unguarded, and guarded without batches. Each gets
the same requests, from several clients at once. Requests have the proportions of LLaVA-1.5: about
600 tokens of pictures to 50 of text. The guard is the one that ships, without the reading of words
in pictures, which costs what OCR costs. No gate opens on these requests, so every server gives the
same answers.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from bench.subjects import Subjects, embedded, several_questions
from bench.timing import as_json, ratios, spread
from vlm_safeguard.data import drawings
from vlm_safeguard.guard import Guard
from vlm_safeguard.server.app import create_app
from vlm_safeguard.server.listen import uvicorn_config
from vlm_safeguard.server.settings import Settings
from vlm_safeguard.server.telemetry import Telemetry
from vlm_safeguard.server.transformers_engine import TransformersEngine
from vlm_safeguard.utils.allocator import keep_freed_memory
from vlm_safeguard.utils.files import write_whole
from vlm_safeguard.utils.markdown import table
from vlm_safeguard.utils.network import address, listen

IMAGES, QUESTIONS = 36, 4  # 576 tokens of pictures, about 50 of text
TOKENS = 25
SERVERS = ("guarded", "unguarded", "guarded, batch 1")


@dataclass(frozen=True)
class Load:
    """One round against one server: requests a second, the latency of each request, and tokens."""

    rate: float
    seconds: list[float]
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round")
    given = parser.parse_args()
    keep_freed_memory()  # as the command does
    subject = embedded()
    shipped = Guard.from_pretrained("embedded")
    config = shipped.config.model_copy(update={"reads_pictures": False})
    guard = Guard(config, shipped.tensors)
    bodies = shut(subject, guard, max(given.clients))
    found = {
        clients: measure(subject, guard, bodies[:clients], given.requests, given.rounds)
        for clients in given.clients
    }
    command = (
        f"python -m bench.serving --clients {' '.join(map(str, given.clients))}"
        f" --rounds {given.rounds} --requests {given.requests}"
    )
    precision = str(subject.loaded.model.dtype).removeprefix("torch.")
    (given.output / "assets").mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json({n: _facts(rounds) for n, rounds in found.items()}), indent=1) + "\n"
    files = {"assets/bench-serving.json": text, "bench-serving.md": page(found, command, precision)}
    write_whole({given.output / name: content.encode() for name, content in files.items()})
    print(given.output / "bench-serving.md")


def shut(subject: Subjects, guard: Guard, count: int) -> list[dict[str, Any]]:
    """The first requests on which no gate opens: a refusal would be shorter than the answer."""
    found: list[dict[str, Any]] = []
    tried = 0
    with serving(subject, guard, 1, 1) as url, httpx.Client(timeout=None) as client:
        while len(found) < count:
            body = _body(tried)
            answer = client.post(f"{url}/v1/chat/completions", json=body | {"max_tokens": 1})
            answer.raise_for_status()
            found += [] if answer.json()["safeguard"]["fired"] else [body]
            tried += 1
    print(f"no gate opens on {count} of {tried} requests", file=sys.stderr)
    return found


def measure(
    subject: Subjects, guard: Guard, bodies: list[dict[str, Any]], requests: int, rounds: int
) -> dict[str, list[Load]]:
    """Guarded and unguarded in turns, side by side in each round; without batches, which takes
    longest, in the first alone. One client for each of ``bodies``."""
    clients = len(bodies)
    found: dict[str, list[Load]] = {name: [] for name in SERVERS}
    guarded, unguarded, alone = SERVERS
    for number in range(rounds):
        turns = (unguarded, guarded) if number % 2 else (guarded, unguarded)
        for name in turns if number else (*turns, alone):
            batch = 1 if name.endswith("batch 1") else 8
            with serving(subject, None if name == "unguarded" else guard, batch, clients) as url:
                load(url, bodies[:1], 1)  # warms up
                loaded = load(url, bodies, requests)
            told = f"{clients} clients, {name}: {loaded.rate:.3f}/s, {loaded.tokens} tokens"
            print(told, file=sys.stderr)
            found[name].append(loaded)
    return found


@contextmanager
def serving(subject: Subjects, guard: Guard | None, batch: int, clients: int) -> Iterator[str]:
    """A server on a free port; its address."""
    settings = Settings(
        model="bench", batch=batch, waiting=2 * clients + 8, max_images=IMAGES, deadline=3600.0,
        check_every=1e9, window=1.0,
    )  # fmt: skip
    engine = TransformersEngine(subject.loaded, guard, settings, Telemetry())
    engine.start()
    server = uvicorn.Server(uvicorn_config(create_app(engine), settings))
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=partial(server.run, sockets=[listener]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address(listener, "127.0.0.1")
    finally:
        server.should_exit = True
        thread.join()


def load(url: str, bodies: list[dict[str, Any]], requests: int) -> Load:
    """Each client asks its request so often, one after the other."""

    def ask(body: dict[str, Any]) -> list[tuple[float, int]]:
        answers = []
        with httpx.Client(timeout=None) as client:
            for _ in range(requests):
                start = time.perf_counter()
                answer = client.post(f"{url}/v1/chat/completions", json=body)
                answer.raise_for_status()
                tokens = answer.json()["usage"]["completion_tokens"]
                answers.append((time.perf_counter() - start, tokens))
        return answers

    start = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = [one for each in pool.map(ask, bodies) for one in each]
    rate = len(found) / (time.perf_counter() - start)
    return Load(rate, [seconds for seconds, _ in found], sum(tokens for _, tokens in found))


def _body(number: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    drawings.blank().save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    text = several_questions(number, QUESTIONS)
    content = [*[picture] * IMAGES, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return {"model": "bench", "messages": messages, "max_tokens": TOKENS}


def _facts(rounds: dict[str, list[Load]]) -> dict[str, Any]:
    """Rates, latencies, and the rate beside that of the unguarded server, round by round."""
    facts: dict[str, Any] = {}
    for name, loads in rounds.items():
        seconds = sorted(s for one in loads for s in one.seconds)
        facts[name] = {
            "tokens": sum(one.tokens for one in loads) / len(seconds),
            "rate": spread([one.rate for one in loads]),
            "ratio": ratios(
                [one.rate for one in loads],
                [one.rate for one in rounds["unguarded"][: len(loads)]],
            ),
            "latency": {p: seconds[int(p / 100 * (len(seconds) - 1))] for p in (50, 90, 99)},
        }
    return facts


def page(found: dict[int, dict[str, list[Load]]], command: str, precision: str) -> str:
    """The measurements as Markdown."""
    rows = []
    for clients, servers in found.items():
        for name, facts in _facts(servers).items():
            latency = facts["latency"]
            rows.append(
                [
                    str(clients),
                    name,
                    str(facts["rate"]),
                    str(facts["ratio"]),
                    *(f"{latency[p]:.1f}" for p in (50, 90, 99)),
                    f"{facts['tokens']:.1f}",
                ]
            )
    head = ["Clients", "Server", "Requests/s", "Ratio to unguarded", "p50 s", "p90 s", "p99 s"]
    head += ["Tokens"]
    lines = [
        "# What the guard costs a server",
        "",
        f"`{command}` on the embedded model in {precision}, on a CPU.",
        f"Requests hold {IMAGES} pictures of 16 tokens and about 50 tokens of text, the",
        f"proportions of LLaVA-1.5, and ask for {TOKENS} tokens. The guard is the one that ships,",
        "without OCR; no gate opens, so every server gives the same answers. A batch waits a",
        "second for requests, so that every server makes the same batches, of at most 8.",
        "Medians and quartiles over the rounds; ratios are taken round by round. The server",
        "without batches has one round.",
        "",
        table(head, rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
