"""Sets a threshold with a finite-sample guarantee, by split conformal calibration.

The scores of harmless prompts that no gate was fitted to are exchangeable with those of future
harmless prompts. If k of n such scores are above a threshold, its false-positive rate is at most
epsilon with confidence 1 - BinomCDF(k; n, epsilon) (Vovk 2012, "Conditional validity of inductive
conformal predictors", proposition 2a). This holds for the threshold itself, not for an average over
calibrations.
"""

from __future__ import annotations

import math

from torch import Tensor

from vlm_safeguard.errors import CalibrationError

CONFIDENCE = 0.95


def allowed_exceedances(count: int, epsilon: float, confidence: float = CONFIDENCE) -> int:
    """The largest k with BinomCDF(k; count, epsilon) <= 1 - confidence, or -1 if there is none."""
    if not 0 < epsilon < 1 or not 0 < confidence < 1:
        raise ValueError("epsilon and confidence lie strictly between 0 and 1")
    from scipy.stats import binom  # takes a second to import

    reached = int(binom.ppf(1 - confidence, count, epsilon))  # the first k to reach it
    return reached if binom.cdf(reached, count, epsilon) <= 1 - confidence else reached - 1


def conformal_threshold(scores: Tensor, epsilon: float) -> float:
    """The lowest threshold whose false-positive rate is at most ``epsilon``, with 95% confidence.

    Args:
        scores: scores (n,) of harmless prompts that the gate was not fitted to, one per question. A
            gate opens if a score is strictly above the threshold.
        epsilon: false-positive rate, between 0 and 1.

    Raises:
        CalibrationError: there are too few scores to guarantee the rate.
    """
    allowed = check_enough(len(scores), epsilon)
    return float(scores.sort(descending=True).values[allowed])


def check_enough(count: int, epsilon: float) -> int:
    """``allowed_exceedances``, with an error if ``count`` scores are too few for a guarantee.

    Raises:
        CalibrationError: there are too few scores; the message says how many are needed.
    """
    allowed = allowed_exceedances(count, epsilon)
    if allowed < 0:
        raise CalibrationError(
            f"a false-positive rate of at most {epsilon:.2%} with {CONFIDENCE:.0%} confidence "
            f"needs {least_bound(epsilon)} harmless prompts to set the threshold on, "
            f"there are {count}: add some, or allow more with --max-false-positives"
        )
    return allowed


def least_bound(epsilon: float) -> int:
    """How many scores a guarantee needs at least."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-epsilon))
