"""Exact match and F1 of generated answers against accepted ones, in the style of SQuAD."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import datasets
import evaluate

from c2c_hf.evaluation.metrics.intervals import bootstrap_interval, wilson_interval

_DESCRIPTION = (
    "Exact match and token F1 of generated answers, each against the accepted answer that fits best, as in SQuAD: "
    "case, punctuation and English articles do not count. Every Chinese character is a token, as in CMRC 2018."
)
_CITATION = """@inproceedings{rajpurkar2016squad,
  title={SQuAD: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={EMNLP},
  year={2016}
}"""
_INPUTS = """
Args:
    predictions (list of str): The generated answer per item.
    references (list of lists of str): The accepted answers per item, at least one.
    seed (int): Of the bootstrap; default 0.

Returns:
    exact_match (float): Share of items whose normalized answer is an accepted one, in [0, 1].
    exact_match_interval (list of two floats): Wilson's 95 % interval.
    f1 (float): Mean token F1, in [0, 1].
    f1_interval (list of two floats): 95 %, of a bootstrap.
    num_items (int): Number of items.

Example:
    >>> metric.compute(predictions=["The Hunter River."], references=[["Hunter River", "Coal River"]])["f1"]
    1.0
"""
_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")


class ExactMatchF1(evaluate.Metric):
    """Exact match and token F1 in the style of SQuAD, as an `evaluate.Metric`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            reference_urls=["https://rajpurkar.github.io/SQuAD-explorer"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]], seed: int = 0) -> dict[str, object]:
        scores = [answer_scores(*pair) for pair in zip(predictions, references, strict=True)]
        exact, f1 = [score.exact_match for score in scores], [score.f1 for score in scores]
        return {
            "exact_match": sum(exact) / len(exact),
            "exact_match_interval": list(wilson_interval(exact)),
            "f1": sum(f1) / len(f1),
            "f1_interval": list(bootstrap_interval(f1, seed)),
            "num_items": len(scores),
        }


class AnswerScores(NamedTuple):
    """Scores of one generated answer, each 0 to 1, against the accepted answer that fits best.

    Attributes:
        exact_match: Whether the normalized texts are the same.
        f1: Of the tokens of the normalized texts.
        contains: Whether the tokens of an accepted answer stand in the generated one, in a row.
    """

    exact_match: float
    f1: float
    contains: float


def answer_scores(prediction: str, accepted: Sequence[str]) -> AnswerScores:
    """Score one generated answer.

    Args:
        prediction: The generated answer.
        accepted: The accepted answers, at least one.
    """
    found, answers = normalize_answer(prediction), [normalize_answer(answer) for answer in accepted]
    tokens = f" {' '.join(_TOKEN.findall(found))} "
    return AnswerScores(
        exact_match=float(found in answers),
        f1=max(_token_f1(found, answer) for answer in answers),
        contains=float(any(answer and f" {' '.join(_TOKEN.findall(answer))} " in tokens for answer in answers)),
    )


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without punctuation, English articles and repeated spaces."""
    words = re.sub(r"[^\w\s]|_", " ", text.lower())
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", words).split())


def _token_f1(prediction: str, answer: str) -> float:
    """Return the F1 of two normalized texts' tokens, as multisets."""
    found, right = _TOKEN.findall(prediction), _TOKEN.findall(answer)
    if not found or not right:
        return float(found == right)
    shared = (Counter(found) & Counter(right)).total()
    return 2 * shared / (len(found) + len(right))
