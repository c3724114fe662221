"""Judges of responses, and how reliable each is: make one with ``make_judge``.

Every judge takes (prompt, response) pairs and gives one ``Judgement`` each. Which to believe is
measured, not assumed: ``validate`` holds a judge against labelled responses.
"""

from vlm_safeguard.evaluation.judges.error_rates import JudgeErrors, check_chosen_for, judge_errors
from vlm_safeguard.evaluation.judges.factory import make_judge
from vlm_safeguard.evaluation.judges.judgement import Judge, JudgeError, Judgement
from vlm_safeguard.evaluation.judges.validate import (
    Validation,
    corrected_rate,
    read_labelled,
    validate,
    validation_page,
)

__all__ = [
    "Judge",
    "JudgeError",
    "JudgeErrors",
    "Judgement",
    "Validation",
    "check_chosen_for",
    "corrected_rate",
    "judge_errors",
    "make_judge",
    "read_labelled",
    "validate",
    "validation_page",
]
