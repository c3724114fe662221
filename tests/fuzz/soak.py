"""A server under four times the load that it can carry, for a quarter of an hour.

python -m tests.fuzz.soak [--minutes 15]

There are four times as many clients as requests can wait, and each asks again at once. Every answer
is compared with the one that the same question gets alone. Prints a JSON summary; exit code 1 after
a wrong or lost answer, a 5xx, a token that was served unguarded, an answer behind its deadline, or
memory that grows.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests import checkpoint
from tests.server.live import MODEL, Live, serving

BATCH, WAITING, OVERLOAD = 4, 8, 4
DEADLINE = 20.0
WARM_UP = 0.2  # share of the time in which memory may still grow
GROWTH = 0.05  # of the memory after the warm-up
MB = 2**20


@dataclass
class Soak:
    """What was seen. Clients count under the lock."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of answers
    memory: list[tuple[float, float]] = field(default_factory=list)  # when, and MB
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def growth(self, minutes: float) -> float:
        """Memory in the last fifth of the time over that in the fifth behind the warm-up."""
        ends = [(WARM_UP, 2 * WARM_UP), (1 - WARM_UP, 2.0)]
        first, last = (
            statistics.median(
                used for when, used in self.memory if low <= when / (60 * minutes) < high
            )
            for low, high in ends
        )
        return last / first - 1


def questions() -> list[dict[str, Any]]:
    """Bodies of different questions: short and long, with and without a picture, sampled, in
    several turns."""
    pictures = [data_uri(Image.new("RGB", (24, 24), colour)) for colour in ("red", "navy")]
    bodies = []
    for number in range(40):
        text = f"question {number} " + "and more words " * (number % 5)
        content: Any = text
        if number % 2:
            image = {"type": "image_url", "image_url": {"url": pictures[number % 4 // 2]}}
            content = [image, {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        if number % 7 == 0:
            turns += [
                {"role": "assistant", "content": "I see"},
                {"role": "user", "content": f"and {number}?"},
            ]
        body = {"model": MODEL, "messages": turns, "max_tokens": 4 + number % 5}
        if number % 3 == 0:
            body |= {"temperature": 0.8, "seed": number}
        bodies.append(body)
    return bodies


def data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def said(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def ask(
    live: Live, bodies: list[dict[str, Any]], alone: list[str], first: int, end: float, soak: Soak
) -> None:
    """One client: asks until the time is over."""
    with httpx.Client(base_url=live.url, timeout=2 * DEADLINE) as client:
        for number in itertools.count(first):
            if time.monotonic() > end:
                return
            place, began = number % len(bodies), time.monotonic()
            try:
                answer = client.post("/v1/chat/completions", json=bodies[place])
            except Exception as error:
                with soak.lock:
                    soak.faults.append(f"lost: {error!r}")
                continue
            took = time.monotonic() - began
            with soak.lock:
                soak.statuses[str(answer.status_code)] += 1
                if answer.status_code == 200:
                    soak.seconds.append(took)
                    if said(answer) != alone[place]:
                        soak.faults.append(f"question {place}: another answer")
                    if took > DEADLINE:
                        soak.faults.append(f"question {place}: {took:.1f} s")
                elif answer.status_code != 429:
                    soak.faults.append(f"question {place}: status {answer.status_code}")
                elif "Retry-After" not in answer.headers:
                    soak.faults.append("429 without Retry-After")
            if answer.status_code == 429:
                time.sleep(0.1)


def used() -> float:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


def run(minutes: float) -> tuple[Soak, dict[str, Any]]:
    soak, bodies = Soak(), questions()
    with tempfile.TemporaryDirectory() as place:
        folder = checkpoint.save(Path(place))
        limits = {"batch": BATCH, "waiting": WAITING, "deadline": DEADLINE}
        with serving(folder, audit=Path(place) / "audit.jsonl", **limits) as live:
            alone = [said(live.client.post("/v1/chat/completions", json=body)) for body in bodies]
            began = time.monotonic()
            end = began + 60 * minutes
            clients = [
                threading.Thread(target=ask, args=(live, bodies, alone, number, end, soak))
                for number in range(OVERLOAD * (BATCH + WAITING))
            ]
            for client in clients:
                client.start()
            while any(client.is_alive() for client in clients):
                soak.memory.append((time.monotonic() - began, used()))
                with soak.lock:
                    done = dict(soak.statuses)
                print(f"{soak.memory[-1][0]:.0f} s: {done}", file=sys.stderr)
                for client in clients:
                    client.join(5.0 / len(clients))
            if live.witness.unguarded:
                soak.faults.append(f"{live.witness.unguarded} tokens without a guard")
            if not live.engine.alive or live.client.get("/ready").status_code != 200:
                soak.faults.append("the server is not ready after the run")
            guarded = live.witness.guarded
    growth = soak.growth(minutes)
    if growth > GROWTH:
        soak.faults.append(f"memory grew by {growth:.1%}")
    ranks = sorted(soak.seconds)
    latency = {p: round(ranks[int(p / 100 * (len(ranks) - 1))], 2) for p in (50, 95, 100)}
    return soak, {
        "minutes": minutes,
        "clients": OVERLOAD * (BATCH + WAITING),
        "statuses": dict(soak.statuses),
        "seconds by percentile": latency,
        "answers a second": round(len(ranks) / (60 * minutes), 1),
        "tokens under guard": guarded,
        "memory in MB": round(soak.memory[-1][1]),
        "growth of memory": round(growth, 4),
        "faults": soak.faults[:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The server under more load than it can carry.")
    parser.add_argument("--minutes", type=float, default=15.0)
    soak, summary = run(parser.parse_args().minutes)
    json.dump(summary, sys.stdout, indent=1)
    print()
    sys.exit(bool(soak.faults))


if __name__ == "__main__":
    main()
