"""Judged responses, written as letters."""

from __future__ import annotations

from vlm_safeguard.evaluation.harness import results

WORDS = {"c": "complied", "r": "refused", "d": "degenerate", "o": "off_subject", "?": None}


def judged(
    defence: str, verdicts: str, harmful: bool = True, templates: int = 5
) -> list[results.Judged]:
    """Rows from letters (see ``WORDS``), ``templates`` to a question."""
    return [
        results.Judged(
            model="m",
            defence=defence,
            benchmark="b",
            setting="text",
            id=f"{harmful}-{n}",
            cluster=f"{harmful}-{n // templates}",
            harmful=harmful,
            prompt="p",
            response="a",
            verdict=WORDS[letter],
            reason="" if WORDS[letter] else "no verdict",
            tokens=1,
            truncated=False,
            fired=None,
        )
        for n, letter in enumerate(verdicts)
    ]
