"""`python -m bench.later_turns`: how often a gate opens on what is asked in the second turn.

It prints how many of 40 conversations of each kind open a gate of the guard for the embedded model.
Questions of the evaluation set, which no calibration has seen, stand alone and behind an earlier
turn, which also had a blank image. Follow-ups are harmless and mean nothing without the turn before
(``follow_ups.jsonl``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from PIL import Image

from vlm_safeguard.data import drawings, prompts
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.evaluation.studies.modality_gap.conditions import (
    LOOK,
    SEEN,
    Talk,
    Turn,
    messages,
)
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.utils.markdown import table
from vlm_safeguard.utils.progress import Progress
from vlm_safeguard.utils.stats import wilson

COUNT, BATCH = 40, 16
FOLLOW_UPS = Path(__file__).with_name("follow_ups.jsonl")
HEAD = ["Last turn", "Alone", "Second turn", "Second turn, a blank image in the first"]


def talk(first: str, *others: str, image: Image.Image | None = None) -> Talk:
    """User and assistant in turn, the first message with the image."""
    images = () if image is None else (image,)
    return (Turn("user", first, images), *map(Turn, cycle(("assistant", "user")), others))


def kinds() -> dict[str, list[list[Talk]]]:
    """For each kind of last turn, the conversations of each column of the table."""
    blank, found = drawings.blank(), dict[str, list[list[Talk]]]()
    for name, harmful in (("harmful", True), ("harmless", False)):
        items = [p for p in prompts.evaluation("malicious") if p.harmful == harmful]
        said = [p.prompt for p in evenly([p for p in items if p.harmful or p.ordinary], COUNT)]
        found[name] = [
            [talk(text) for text in said],
            [talk(LOOK, SEEN, text) for text in said],
            [talk(LOOK, SEEN, text, image=blank) for text in said],
        ]
    rows = [json.loads(line) for line in FOLLOW_UPS.read_text(encoding="utf-8").splitlines()]
    parts = [(row["question"], row["answer"], row["follow_up"]) for row in rows]
    found["harmless follow-up"] = [
        [talk(last) for *_, last in parts],
        [talk(*one) for one in parts],
        [talk(*one, image=blank) for one in parts],
    ]
    return found


def opened(loaded: LoadedModel, guard: Guard, talks: Sequence[Talk], progress: Progress) -> str:
    """How many conversations open a gate: a cell of a table."""
    fired: list[bool] = []
    with guard.attach(loaded.model, loaded.processor, monitor=True) as session:
        starts = range(0, len(talks), BATCH)
        for start in progress.track(starts, "conversations"):
            some = [messages(one) for one in talks[start : start + BATCH]]
            inputs = guard.prepare(loaded.processor, some)
            loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
            fired += [decision.fired for decision in session.decisions]
    return str(wilson(sum(fired), len(fired)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.later_turns", description=__doc__)
    parser.add_argument("--guard", default="embedded", help="guard folder")
    given = parser.parse_args()
    loaded, guard = load(assemble()), Guard.from_pretrained(given.guard)
    progress = Progress()
    rows = [
        [kind, *(opened(loaded, guard, talks, progress) for talks in columns)]
        for kind, columns in kinds().items()
    ]
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
