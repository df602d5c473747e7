"""Accuracy with Wilson's 95 % interval."""

import datasets
import evaluate

from c2c_hf.evaluation.metrics.intervals import wilson_interval

_DESCRIPTION = "Share of right predictions, with Wilson's 95 % interval."
_INPUTS = """
Args:
    predictions (list of int): Index of the choice per item, or 1 where an answer was graded right, else 0.
    references (list of int): The right index per item, or 1 for graded answers.

Returns:
    accuracy (float): In [0, 1].
    interval (list of two floats): Wilson's 95 % interval.
    num_items (int): Number of items.

Example:
    >>> metric.compute(predictions=[0, 2, 1], references=[0, 1, 1])["accuracy"]
    0.6666666666666666
"""


class Accuracy(evaluate.Metric):
    """Share of right predictions with Wilson's interval, as an `evaluate.Metric`."""

    def _info(self) -> evaluate.MetricInfo:
        index = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": index, "references": index}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, object]:
        correct = [int(found == right) for found, right in zip(predictions, references, strict=True)]
        return {
            "accuracy": sum(correct) / len(correct),
            "interval": list(wilson_interval(correct)),
            "num_items": len(correct),
        }
