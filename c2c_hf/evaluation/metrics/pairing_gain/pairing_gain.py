"""Pairing gain: the accuracy of C2C less that of C2C with a mismatched sharer."""

import datasets
import evaluate

from c2c_hf.evaluation.metrics.intervals import paired_difference

_DESCRIPTION = (
    "Accuracy of C2C less its accuracy with the mismatched-sharer control, whose sharers prefill another question: "
    "what the right sharer cache adds. Paired item by item, with a bootstrap interval and McNemar's exact test."
)
_INPUTS = """
Args:
    predictions (list of int): C2C's index of the choice per item, or 1 where an answer was graded right, else 0.
    mismatched_predictions (list of int): The same under the mismatched-sharer control.
    references (list of int): The right index per item, or 1 for graded answers.
    seed (int): Of the bootstrap; default 0.

Returns:
    pairing_gain (float): In [-1, 1].
    interval (list of two floats): 95 %, of a paired bootstrap.
    p_value (float): Of McNemar's exact test.
    num_items (int): Number of items.

Example:
    >>> metric.compute(predictions=[0, 1], mismatched_predictions=[0, 0], references=[0, 1])["pairing_gain"]
    0.5
"""


class PairingGain(evaluate.Metric):
    """Accuracy of C2C less that of the mismatched-sharer control, as an `evaluate.Metric`."""

    def _info(self) -> evaluate.MetricInfo:
        names = ("predictions", "mismatched_predictions", "references")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({name: datasets.Value("int64") for name in names}),
        )

    def _compute(
        self, predictions: list[int], mismatched_predictions: list[int], references: list[int], seed: int = 0
    ) -> dict[str, object]:
        correct, mismatched_correct = (
            [int(found == right) for found, right in zip(answers, references, strict=True)]
            for answers in (predictions, mismatched_predictions)
        )
        gain = paired_difference(correct, mismatched_correct, seed)
        return {
            "pairing_gain": gain.value,
            "interval": list(gain.interval),
            "p_value": gain.p_value,
            "num_items": gain.num_items,
        }
