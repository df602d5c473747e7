"""Intervals and tests for accuracies on the same items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, bootstrap

Interval = tuple[float, float]
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """How much more often one method is right than another on the same items.

    Attributes:
        value: Difference of the accuracies.
        interval: 95 %, from a paired bootstrap.
        p_value: Of McNemar's exact test.
        num_items: Number of items that both answered.
    """

    value: float
    interval: Interval
    p_value: float
    num_items: int


def accuracy_interval(correct: Sequence[float]) -> Interval:
    """Return Wilson's 95 % interval of an accuracy."""
    interval = binomtest(int(sum(correct)), len(correct)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(correct: Sequence[float], others: Sequence[float], seed: int = 0) -> Difference:
    """Compare two methods item by item.

    Args:
        correct: 1 where the first method is right, else 0.
        others: The second method's, in the same order.
        seed: Of the bootstrap.

    Raises:
        ValueError: There are no items, or not the same number.
    """
    if len(correct) != len(others) or not len(correct):
        raise ValueError(
            f"`others` must be {len(correct)} results for the same items, at least one, got {len(others)}."
        )
    first, second = np.asarray(correct, dtype=float), np.asarray(others, dtype=float)
    differences = first - second
    interval = (float(differences[0]), float(differences[0]))
    if np.ptp(differences) > 0:
        # In slices, since all resamples at once would fill the memory.
        result = bootstrap(
            (differences,),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            batch=500,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        interval = (float(result.confidence_interval.low), float(result.confidence_interval.high))
    better, disagreeing = int((differences > 0).sum()), int((differences != 0).sum())
    p_value = float(binomtest(better, disagreeing).pvalue) if disagreeing else 1.0
    return Difference(float(differences.mean()), interval, p_value, len(differences))


def performance_gap_recovered(fused: float, receiver: float, sharers: Sequence[float]) -> float | None:
    """Return `(C2C - receiver) / (stronger - receiver)`, or `None` where no sharer is stronger.

    Args:
        fused: Accuracy of C2C.
        receiver: Accuracy of the receiver alone.
        sharers: Accuracy of each sharer alone.
    """
    gap = max(sharers, default=receiver) - receiver
    return (fused - receiver) / gap if gap > 0 else None
