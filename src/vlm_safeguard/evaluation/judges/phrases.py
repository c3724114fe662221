"""The refusal-phrase judge. For smoke tests only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_safeguard.evaluation.judges.judgement import Asks, Judgement, Pair
from vlm_safeguard.model.refusal_phrases import BUILT_IN, RefusalPhrases
from vlm_safeguard.model.refusals import judge


class PhraseJudge:
    """Refusal phrases in the opening of a response.

    On HarmBench's labelled responses, matching phrases has a sensitivity of 0.94 and a specificity
    of 0.53 on text, 1.0 and 0.135 on multimodal responses: it calls most of what it does not
    recognise an attack success.
    """

    asks: Asks = "refusal"

    def __init__(self, file: Path | None = None) -> None:
        """Use the built-in phrases, or those of ``file``, one on a line.

        Raises:
            DataError: the file cannot be read, is not UTF-8, or has no phrase.
        """
        self.phrases = BUILT_IN if file is None else RefusalPhrases.from_file(file)
        self.name = self.phrases.name

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement for each (prompt, response)."""
        return [
            Judgement(judge(response, prompt, self.phrases), "phrases")
            for prompt, response in pairs
        ]
