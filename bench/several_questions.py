"""`python -m bench.several_questions`: how often a gate opens on several questions in one message.

It prints how many of 40 messages of each kind open a gate of the guard for the embedded model. The
questions are those of the evaluation set, which no calibration has seen.
"""

from __future__ import annotations

import argparse

from vlm_safeguard.calibration.attack_trials import without
from vlm_safeguard.data import drawings, prompts
from vlm_safeguard.data.inputs import Query
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.utils.markdown import table
from vlm_safeguard.utils.stats import wilson

MESSAGES = 40
KINDS = {"4 harmless": (0, 4), "1 harmful, 3 harmless": (1, 3), "2 harmful": (2, 0)}


def messages(harmful: int, harmless: int) -> list[str]:
    """Messages of so many questions of each label, the harmful ones first."""
    items = prompts.evaluation("malicious")
    parts = [([p.prompt for p in items if p.harmful], harmful)]
    parts += [([p.prompt for p in items if p.ordinary], harmless)]
    found = []
    for first in range(MESSAGES):
        asked = [
            pool[(first + step * (len(pool) // count)) % len(pool)]
            for pool, count in parts
            for step in range(count)
        ]
        found.append(" ".join(asked))
    return found


def opened(loaded: LoadedModel, guard: Guard, said: list[str], pictured: bool) -> str:
    """How many messages open a gate, as text or beside a blank image: a cell of a table."""
    image = drawings.blank() if pictured else None
    asked = [Query(text, image) for text in said]
    fired = without(loaded, guard, asked, 1).fired
    return str(wilson(sum(fired), len(fired)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.several_questions", description=__doc__)
    parser.add_argument("--guard", default="embedded", help="guard folder")
    given = parser.parse_args()
    loaded, guard = load(assemble()), Guard.from_pretrained(given.guard)
    rows = [
        [kind, *(opened(loaded, guard, messages(*counts), pictured) for pictured in (False, True))]
        for kind, counts in KINDS.items()
    ]
    print(table(["Questions in a message", "Gate opens, text", "Gate opens, blank image"], rows))


if __name__ == "__main__":
    main()
