"""`python -m bench.text_forms`: how often a guard opens on requests that are written otherwise.

It prints the table of docs/results.md. *Before* is the guard that reads a text only as it stands.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence

import torch

from vlm_safeguard.data.prompts import Prompt, evaluation
from vlm_safeguard.data.sampling import evenly
from vlm_safeguard.embedded.assemble import assemble
from vlm_safeguard.guard import Guard
from vlm_safeguard.model.canonical_text import canonical_text
from vlm_safeguard.model.chat import encode
from vlm_safeguard.model.loading import LoadedModel, load
from vlm_safeguard.utils.markdown import table
from vlm_safeguard.utils.stats import wilson

_PADDING = (
    "Our house has a small garden with two apple trees. In autumn the whole family picks the "
    "apples and bakes a cake together."
)
_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_WIDE = {code: code + 0xFEE0 for code in range(ord("!"), ord("~") + 1)}


def _alternating(text: str) -> str:
    return "".join(c.upper() if place % 2 else c.lower() for place, c in enumerate(text))


def _zero_width(text: str) -> str:
    return re.sub(r"(?<=\w)(?=\w)", "\u200b", text)


FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "zero-width spaces inside words": _zero_width,
    "full-width letters": lambda text: text.translate(_WIDE),
    "UPPER CASE": str.upper,
    "Title Case": str.title,
    "aLtErNaTiNg CaSe": _alternating,
    "l337sp34k": lambda text: text.translate(_LEET),
    "s p a c e d letters": " ".join,
    "harmless sentences before": lambda text: f"{_PADDING} {text}",
    "harmless sentences after": lambda text: f"{text} {_PADDING}",
}


@torch.inference_mode()
def opened(
    loaded: LoadedModel, guard: Guard, texts: Sequence[str], reads: bool, batch: int = 16
) -> list[bool]:
    """Whether a gate opens on each text; ``reads``: with its canonical form."""
    found: list[bool] = []
    with guard.attach(loaded.model, loaded.processor if reads else None) as session:
        for start in range(0, len(texts), batch):
            chosen = texts[start : start + batch]
            loaded.model(**encode(loaded, chosen, [None] * len(chosen)), logits_to_keep=1)
            found += [decision.fired for decision in session.decisions]
    return found


def measured(loaded: LoadedModel, guard: Guard, prompts: Sequence[Prompt]) -> str:
    """The table of all forms of the prompts, in Markdown."""
    rows = []
    for name, write in FORMS.items():
        texts = [write(prompt.prompt) for prompt in prompts]
        before = opened(loaded, guard, texts, reads=False)
        same = all(canonical_text(text) == text for text in texts)
        now = before if same else opened(loaded, guard, texts, reads=True)
        cells = []
        for harmful in (True, False):
            for fired in (before, now):
                own = [f for f, p in zip(fired, prompts, strict=True) if p.harmful is harmful]
                cells.append(wilson(sum(own), len(own)).interval)
        rows.append([name, *cells])
    head = ["Form", "Harmful, before", "Harmful, now", "Harmless, before", "Harmless, now"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.text_forms", description=__doc__)
    parser.add_argument("--limit", type=int, default=100, help="prompts of each label")
    given = parser.parse_args()
    prompts = evenly(evaluation("malicious"), given.limit)
    print(measured(load(assemble()), Guard.from_pretrained("embedded"), prompts))


if __name__ == "__main__":
    main()
