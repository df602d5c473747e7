"""Metrics of the reports, each an `evaluate.Metric` in a folder of its own, and the statistics that they share.

Such a folder loads without a network by [`load`] or `evaluate.load(FOLDER)`:

    accuracy                   share of right predictions, with Wilson's interval
    exact_match_f1             exact match and F1 of generated answers, in the style of SQuAD
    pairing_gain               C2C less C2C with a mismatched sharer, on the same items
    performance_gap_recovered  how much of the gap between receiver and sharer C2C closes
"""

from pathlib import Path

import evaluate

from .accuracy import Accuracy
from .exact_match_f1 import ExactMatchF1
from .pairing_gain import PairingGain
from .performance_gap_recovered import PerformanceGapRecovered

FOLDER = Path(__file__).parent
#: The class of every metric; a name is that of its folder.
METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "exact_match_f1": ExactMatchF1,
    "pairing_gain": PairingGain,
    "performance_gap_recovered": PerformanceGapRecovered,
}


def load(name: str) -> evaluate.Metric:
    """Load a metric.

    Args:
        name: One of `METRICS`.

    Returns:
        The metric; its `compute` takes keyword arguments, which `inputs_description` lists.

    Raises:
        ValueError: The name is unknown.

    Example:
        ```python
        from c2c_hf.evaluation.metrics import load

        gain = load("pairing_gain").compute(
            predictions=[1, 0, 2], mismatched_predictions=[1, 1, 0], references=[1, 0, 2]
        )
        print(gain["pairing_gain"], gain["interval"], gain["p_value"])
        ```
    """
    if name not in METRICS:
        raise ValueError(f"`name` must be one of {list(METRICS)}, but got {name!r}.")
    # Not by `evaluate.load`: it copies the module into a cache and imports the copy without invalidating the caches of
    # the import system, which fails now and then where another process writes there at the same time.
    return METRICS[name]()
