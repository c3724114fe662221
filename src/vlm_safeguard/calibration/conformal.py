"""Sets a threshold with a finite-sample guarantee, by split conformal calibration.

Scores of harmless prompts that took no part in fitting the gate are exchangeable with those of
harmless prompts to come. If k of n of them lie above a threshold, the false-positive rate there is
at most epsilon with confidence 1 - BinomCDF(k; n, epsilon) (Vovk 2012, "Conditional validity of
inductive conformal predictors", proposition 2a): a statement about this very threshold, not about
an average over calibrations.
"""

from __future__ import annotations

import math

from torch import Tensor

from vlm_safeguard.errors import CalibrationError

CONFIDENCE = 0.95


def allowed_exceedances(count: int, epsilon: float, confidence: float = CONFIDENCE) -> int:
    """The largest k with BinomCDF(k; count, epsilon) <= 1 - confidence; -1 where there is none."""
    if not 0 < epsilon < 1 or not 0 < confidence < 1:
        raise ValueError("epsilon and confidence lie strictly between 0 and 1")
    from scipy.stats import binom  # takes a second to import

    reached = int(binom.ppf(1 - confidence, count, epsilon))  # the first k to reach it
    return reached if binom.cdf(reached, count, epsilon) <= 1 - confidence else reached - 1


def conformal_threshold(scores: Tensor, epsilon: float, confidence: float = CONFIDENCE) -> float:
    """The lowest threshold that keeps the false-positive rate at most ``epsilon`` with confidence.

    Args:
        scores: of harmless prompts the gate was not fitted on, one per question, (n,). A gate
            opens on a score strictly above the threshold.
        epsilon: false-positive rate, a share of 1.

    Raises:
        CalibrationError: too few scores for any threshold to be guaranteed.
    """
    allowed = check_enough(len(scores), epsilon, confidence)
    return float(scores.sort(descending=True).values[allowed])


def check_enough(count: int, epsilon: float, confidence: float = CONFIDENCE) -> int:
    """``allowed_exceedances``; refuses a rate that ``count`` scores can guarantee by no threshold.

    Raises:
        CalibrationError: says how many are needed.
    """
    allowed = allowed_exceedances(count, epsilon, confidence)
    if allowed < 0:
        needed = math.ceil(math.log(1 - confidence) / math.log1p(-epsilon))
        raise CalibrationError(
            f"a false-positive rate of at most {epsilon:.2%} with {confidence:.0%} confidence "
            f"needs {needed} harmless prompts to set the threshold on, there are {count}"
        )
    return allowed
