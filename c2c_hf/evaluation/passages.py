"""Passages that only the sharer has read: how much likelier they make the right answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers.utils.logging import tqdm

from ..inference.loglikelihood import continuation_scores
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor

#: What is read: the right passage or another one by the sharer, nothing, or the right one by the receiver itself.
CONDITIONS = ("right", "mismatched", "none", "reading")


@torch.no_grad()
def score_passages(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    rows: Sequence[Mapping[str, Any]],
    conditions: Sequence[str] = CONDITIONS,
) -> dict[str, list[float]]:
    """Score answers about passages.

    Args:
        model: A pair with `mode="memory"`.
        processor: The pair's.
        rows: `sharer_context`, the passage, and `messages`, a question and its answer.
        conditions: Of [`CONDITIONS`]; a mismatched passage is that of the row half of the rows away.

    Returns:
        Per condition the mean log-likelihood per token, in nats, of every row's answer.
    """
    scores: dict[str, list[float]] = {name: [] for name in conditions}
    for index, row in enumerate(tqdm(rows, unit="passage")):
        question, answer = (message["content"] for message in row["messages"])
        passage, other = row["sharer_context"], rows[(index + len(rows) // 2) % len(rows)]["sharer_context"]
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        texts = {
            "right": (question, passage),
            "mismatched": (question, other),
            "none": (question, None),
            "reading": (f"{passage}\n\n{question}", None),
        }
        for name in conditions:
            read, context = texts[name]
            inputs: Any = processor.apply_chat_template([[{"role": "user", "content": read}]], sharer_context=context)
            scores[name].append(float(continuation_scores(model, inputs, [[ids]]).logprobs.sum()) / len(ids))
    return scores


def score_difference(scores: Sequence[float], others: Sequence[float]) -> str:
    """Return the mean difference, its 95 % interval (bootstrap) and the p-value of a paired t-test, in words."""
    differences = np.subtract(scores, others)
    low, high = stats.bootstrap((differences,), np.mean, rng=0).confidence_interval
    return f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}], p = {stats.ttest_rel(scores, others).pvalue:.0e}"


def share_of_reading(scores: Mapping[str, Sequence[float]]) -> float:
    """Return the gain over no passage, relative to that of the receiver that reads it."""
    right, none, reading = (np.mean(scores[name]) for name in ("right", "none", "reading"))
    return float((right - none) / (reading - none))
