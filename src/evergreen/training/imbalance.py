"""Rare clicks: train on a share of the rows without one, and give the scores back what that took from them.

Source: He et al. 2014, Practical lessons from predicting clicks on ads at Facebook, section 6.3; McMahan et al. 2013,
Ad click prediction: a view from the trenches, section 4.6. Deviates: a share of fixed size is drawn, where the papers
toss a coin for each row, so that the correction is exact for the rows drawn and not only on average.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def sample_negatives(labels: NDArray[np.float32], rate: float, *, seed: int) -> NDArray[np.int64]:
    """Choose rows to train on: every positive, and `rate` of the negatives, all of them with the same chance.

    Another seed for every epoch shows the model other negatives, at the same cost.

    Args:
        labels: (n,) 0 or 1.
        rate: share of the negatives to keep, in (0, 1]; rounded up to whole rows.
        seed: equal seeds choose equal rows.

    Returns:
        (m,) row numbers, ascending.

    Raises:
        ValueError: rate is outside (0, 1].
    """
    _check_rate(rate)
    positive = labels > 0
    if rate == 1:
        return np.arange(len(labels), dtype=np.int64)
    negatives = np.flatnonzero(~positive)
    # 1 - 1e-9: 0.1 * 30 is a little above 3, and 3 rows are meant.
    kept = math.ceil(rate * len(negatives) * (1 - 1e-9))
    drawn = np.random.default_rng(seed).choice(negatives, size=kept, replace=False, shuffle=False)
    rows: NDArray[np.int64] = np.sort(np.concatenate([np.flatnonzero(positive), drawn]))
    return rows


def score_correction(*, negative_rate: float, positive_weight: float) -> float:
    """What to add to log-odds that were trained on thinned negatives and weighted positives.

    Training sees the odds p / (1 - p) multiplied by positive_weight / negative_rate, whatever the row says; so its
    log-odds are those of the full data plus the logarithm of that factor. In probabilities, with w = negative_rate /
    positive_weight, p = q / (q + (1 - q) / w). Exact for cross-entropy; the focal loss is not minimised by
    probabilities, so its scores are left to calibration.

    Args:
        negative_rate: share of the negatives that was kept, in (0, 1].
        positive_weight: weight of the positives in the loss, above 0.

    Raises:
        ValueError: an argument is out of its range.
    """
    _check_rate(negative_rate)
    if not (positive_weight > 0 and math.isfinite(positive_weight)):
        raise ValueError(f"positive_weight={positive_weight}: must be above 0 and finite")
    return math.log(negative_rate) - math.log(positive_weight)


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"negative_rate={rate}: must be above 0 and at most 1, the share of negatives to keep")
