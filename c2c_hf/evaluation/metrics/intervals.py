"""Confidence intervals and the paired test of accuracies and other means over items."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.stats import binomtest, bootstrap

Interval: TypeAlias = tuple[float, float]
NUM_RESAMPLES = 10_000


class PairedDifference(NamedTuple):
    """Difference of two methods' accuracies on the same items.

    Attributes:
        value: The first method's accuracy less the second's.
        interval: 95 %, of a paired bootstrap.
        p_value: Of McNemar's exact test.
        num_items: Number of items.
    """

    value: float
    interval: Interval
    p_value: float
    num_items: int


def wilson_interval(correct: Sequence[float]) -> Interval:
    """Return Wilson's 95 % interval of an accuracy.

    Args:
        correct: 1 for each right item, 0 for each wrong one.
    """
    interval = binomtest(int(sum(correct)), len(correct)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the 95 % percentile interval of a mean from `NUM_RESAMPLES` bootstrap resamples.

    Args:
        values: One per item; for a paired comparison the differences, item by item.
        seed: Of the resampling.
    """
    array = np.asarray(values, dtype=float)
    if np.ptp(array) == 0:
        return float(array[0]), float(array[0])
    # In batches, since all resamples at once would fill the memory.
    rng = np.random.default_rng(seed)
    result = bootstrap((array,), np.mean, n_resamples=NUM_RESAMPLES, batch=500, method="percentile", rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_difference(correct: Sequence[float], other_correct: Sequence[float], seed: int = 0) -> PairedDifference:
    """Compare two methods item by item.

    Args:
        correct: 1 where the first method is right, else 0.
        other_correct: The second method's, in the same order.
        seed: Of the bootstrap.

    Raises:
        ValueError: There are no items, or not the same number.
    """
    if len(correct) != len(other_correct) or not len(correct):
        raise ValueError(
            f"`other_correct` must hold {len(correct)} results for the same items, at least one, but got "
            f"{len(other_correct)}."
        )
    differences = np.subtract(correct, other_correct, dtype=float)
    better, disagreeing = int((differences > 0).sum()), int((differences != 0).sum())
    p_value = float(binomtest(better, disagreeing).pvalue) if disagreeing else 1.0
    interval = bootstrap_interval(differences.tolist(), seed)
    return PairedDifference(float(differences.mean()), interval, p_value, len(differences))
