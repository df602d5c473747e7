"""Performance gap recovered: how much of the distance from the receiver to the strongest sharer C2C covers."""

import datasets
import evaluate

_DESCRIPTION = (
    "(C2C - receiver) / (strongest sharer - receiver), of accuracies on the same items: 0 where C2C equals the "
    "receiver, 1 where it equals the sharer. Not defined where no sharer is stronger than the receiver."
)
_CITATION = """@article{burns2023weak,
  title={Weak-to-strong generalization: Eliciting strong capabilities with weak supervision},
  author={Burns, Collin and others},
  journal={arXiv:2312.09390},
  year={2023}
}"""
_INPUTS = """
Args:
    predictions (list of int): C2C's index of the choice per item, or 1 where an answer was graded right, else 0.
    receiver_predictions (list of int): The receiver's.
    sharer_predictions (list of lists of int): Per item one for each sharer.
    references (list of int): The right index per item, or 1 for graded answers.

Returns:
    performance_gap_recovered (float or None): None where no sharer is stronger than the receiver.
    num_items (int): Number of items.

Example:
    >>> metric.compute(
    ...     predictions=[0, 1], receiver_predictions=[0, 0], sharer_predictions=[[0], [1]], references=[0, 1]
    ... )["performance_gap_recovered"]
    1.0
"""


class PerformanceGapRecovered(evaluate.Metric):
    """Share of the accuracy gap between receiver and strongest sharer that C2C closes, as an `evaluate.Metric`."""

    def _info(self) -> evaluate.MetricInfo:
        index = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": index,
                    "receiver_predictions": index,
                    "sharer_predictions": datasets.Sequence(index),
                    "references": index,
                }
            ),
        )

    def _compute(
        self,
        predictions: list[int],
        receiver_predictions: list[int],
        sharer_predictions: list[list[int]],
        references: list[int],
    ) -> dict[str, object]:
        def accuracy(answers: list[int]) -> float:
            return sum(found == right for found, right in zip(answers, references, strict=True)) / len(references)

        if not all(sharer_predictions):
            raise ValueError("`sharer_predictions` must hold at least one prediction per item, but got an empty list.")
        strongest = max(accuracy(list(answers)) for answers in zip(*sharer_predictions, strict=True))
        recovered = gap_recovered(accuracy(predictions), accuracy(receiver_predictions), strongest)
        return {"performance_gap_recovered": recovered, "num_items": len(references)}


def gap_recovered(value: float, floor: float, ceiling: float) -> float | None:
    """Return `(value - floor) / (ceiling - floor)`, or `None` where the ceiling is not above the floor."""
    return (value - floor) / (ceiling - floor) if ceiling > floor else None
