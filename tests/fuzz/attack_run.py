"""Many hostile inputs: for the parsers and pictures in this process, and for a live server.

python -m tests.fuzz.attack_run [--count 100000] [--live 5000] [--seconds S] [--state FILE]

Prints a JSON summary; exit code 1 after a crash, a 5xx, an error that tells of the inside, or a
token that was served unguarded. With ``--state`` an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tests import checkpoint
from tests.fuzz import attack_inputs
from tests.server.live import serving
from tests.server.raw import LEAKS, post
from vlm_safeguard.data.image_io import open_image
from vlm_safeguard.errors import ImageError
from vlm_safeguard.server.body import check_json
from vlm_safeguard.server.conversation import Takes, read_messages
from vlm_safeguard.server.http_errors import RequestError
from vlm_safeguard.server.schema import ChatRequest, Message
from vlm_safeguard.server.settings import Settings

SETTINGS, TAKES = Settings(model="tiny"), Takes(system=True, words=False)
STEP = 500  # inputs between two notes of how far it came


class Run:
    """Counts, and how far each part came."""

    def __init__(self, state: Path | None) -> None:
        self._state = state
        self.done: dict[str, int] = {"parsers": 0, "live": 0}
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.unguarded = 0
        self.seconds = 0.0
        if state is not None and state.is_file():
            kept = json.loads(state.read_text())
            self.outcomes = Counter(kept.pop("outcomes"))
            vars(self).update(kept)
        self._started = time.monotonic() - self.seconds

    def note(self, part: str, number: int) -> None:
        """Keep how far it came, and tell."""
        self.done[part] = number
        self.seconds = round(time.monotonic() - self._started, 1)
        print(f"{part}: {number} inputs, {len(self.faults)} faults", file=sys.stderr)
        if self._state is not None:
            self._state.write_text(json.dumps(self.summary()))

    def fault(self, what: str) -> None:
        self.faults.append(what[-2000:])

    def summary(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "outcomes": dict(self.outcomes.most_common()),
            "faults": self.faults[:20],
            "unguarded": self.unguarded,
            "seconds": self.seconds,
        }


def parse_request(number: int, seed: int) -> str:
    """As the server reads a body."""
    data = attack_inputs.request(number, seed)
    check_json(data)
    read = ChatRequest.model_validate(json.loads(data))
    read_messages(read.messages, SETTINGS, TAKES)
    return "request accepted"


def parse_image(number: int, seed: int) -> str:
    picture = open_image(attack_inputs.image(number, seed))
    assert picture.mode == "RGB" and min(picture.size) >= 8
    return "picture accepted"


def parse_uri(number: int, seed: int) -> str:
    address = {"type": "image_url", "image_url": {"url": attack_inputs.data_uri(number, seed)}}
    message = Message.model_validate({"role": "user", "content": [address]})
    read_messages([message], SETTINGS, TAKES)
    return "address accepted"


PARSERS: list[Callable[[int, int], str]] = [parse_request, parse_image, parse_uri, parse_request]


def try_parsers(run: Run, count: int, seed: int, end: float) -> None:
    """Every input is accepted or refused in our words."""
    for number in range(run.done["parsers"], count):
        parser = PARSERS[number % len(PARSERS)]
        try:
            run.outcomes[parser(number, seed)] += 1
        except (RequestError, ImageError) as error:
            run.outcomes[f"{parser.__name__[6:]} refused"] += 1
            if LEAKS.search(str(error)):
                run.fault(f"parser {number} tells: {error}")
        except ValidationError:
            run.outcomes[f"{parser.__name__[6:]} not of the schema"] += 1
        except Exception:
            run.fault(f"parser {number}: {traceback.format_exc()}")
        if number % STEP == STEP - 1 or number == count - 1:
            run.note("parsers", number + 1)
            if time.monotonic() > end:
                return


def try_live(run: Run, count: int, seed: int, end: float) -> None:
    """Every request gets an answer under guard or a clear refusal."""
    with tempfile.TemporaryDirectory() as place:
        folder = checkpoint.save(Path(place))
        with serving(folder, window=0.005) as live, ThreadPoolExecutor(8) as pool:

            def ask(number: int) -> None:
                try:
                    answer = post(live, attack_inputs.request(number, seed + 1))
                except Exception as error:
                    run.fault(f"request {number}: {error!r}")
                    return
                run.outcomes[f"status {answer.status_code}"] += 1
                if answer.status_code >= 500:
                    run.fault(f"request {number}: {answer.status_code}")
                if answer.status_code != 200 and LEAKS.search(answer.text):
                    run.fault(f"request {number} tells: {answer.text}")

            first = run.done["live"]
            for start in range(first, count, STEP // 5):
                stop = min(count, start + STEP // 5)
                list(pool.map(ask, range(start, stop)))
                run.unguarded += live.witness.unguarded
                run.outcomes["tokens under guard"] += live.witness.guarded
                live.witness.reset()
                run.note("live", stop)
                if time.monotonic() > end:
                    break
            if not live.engine.alive or live.client.get("/ready").status_code != 200:
                run.fault("the server is not ready after the run")


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile inputs for the server.")
    parser.add_argument("--count", type=int, default=100_000, help="inputs for the parsers")
    parser.add_argument("--live", type=int, default=5000, help="requests to a live server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="at most, for each part")
    parser.add_argument("--state", type=Path, help="file to go on from")
    given = parser.parse_args()
    run = Run(given.state)
    try:
        for part, count in ((try_parsers, given.count), (try_live, given.live)):
            part(run, count, given.seed, time.monotonic() + given.seconds)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    json.dump(run.summary(), sys.stdout, indent=1)
    print()
    sys.exit(bool(run.faults or run.unguarded))


if __name__ == "__main__":
    main()
