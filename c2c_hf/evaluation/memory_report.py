"""The report of memory fusers: private facts and real passages as contexts of the sharer only, in one table."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import ttest_rel
from tqdm.auto import tqdm
from transformers import BatchFeature

from ..inference.loglikelihood import continuation_scores
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .evaluate import evaluate
from .methods.registry import ModelWithProcessor
from .metrics.intervals import bootstrap_interval, paired_difference, wilson_interval
from .metrics.performance_gap_recovered import gap_recovered
from .run_records import group_records, write_json

#: Methods for passages; a mismatched passage is that of another row.
PASSAGE_METHODS = ("c2c", "mismatched", "receiver", "receiver_with_context")
#: Methods that do not depend on the memory fuser, with their labels.
_BASELINES = {
    "receiver": "receiver without the context",
    "receiver_with_context": "receiver with the context in its prompt",
    "sharer": "sharer with the context in its prompt",
    "same_text_fusion": "sharer-only context through a fuser with mode='fusion'",
}


@torch.no_grad()
def score_passages(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str] = PASSAGE_METHODS,
) -> dict[str, list[float]]:
    """Compute the log-likelihood of answers to questions about passages.

    Args:
        model: A C2C model with `mode="memory"`.
        processor: Its processor.
        rows: `sharer_context`, the passage, and `messages`, a question and its answer.
        methods: Of `PASSAGE_METHODS`; a mismatched passage is that of the row half of the rows away.

    Returns:
        Per method the mean log-likelihood per token, in nats, of every row's answer.
    """
    scores: dict[str, list[float]] = {method: [] for method in methods}
    for index, row in enumerate(tqdm(rows, unit="passage")):
        question, answer = (message["content"] for message in row["messages"])
        passage, other = row["sharer_context"], rows[(index + len(rows) // 2) % len(rows)]["sharer_context"]
        ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
        texts = {
            "c2c": (question, passage),
            "mismatched": (question, other),
            "receiver": (question, None),
            "receiver_with_context": (f"{passage}\n\n{question}", None),
        }
        for method in methods:
            prompt, context = texts[method]
            chat = [{"role": "user", "content": prompt}]
            inputs = cast(BatchFeature, processor.apply_chat_template([chat], sharer_context=context))
            scores[method].append(float(continuation_scores(model, inputs, [[ids]]).logprobs.sum()) / len(ids))
    return scores


def describe_difference(scores: Sequence[float], others: Sequence[float]) -> str:
    """Return the mean difference of paired scores, its 95 % bootstrap interval and the paired t-test's p-value."""
    differences = np.subtract(scores, others)
    low, high = bootstrap_interval(differences.tolist())
    p_value = ttest_rel(scores, others).pvalue
    return f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}], p = {p_value:.0e}"


def context_gain_recovered(scores: Mapping[str, Sequence[float]]) -> float | None:
    """Return C2C's gain from the context over that of the receiver with the context in its prompt.

    Args:
        scores: Of `c2c`, `receiver` and `receiver_with_context`.

    Returns:
        `None` where the context in the prompt gains nothing.
    """
    c2c, receiver, with_context = (
        float(np.mean(scores[method])) for method in ("c2c", "receiver", "receiver_with_context")
    )
    return gap_recovered(c2c, receiver, with_context)


def memory_report(
    fusers: Iterable[tuple[str, ModelWithProcessor]],
    folder: Path,
    passages: Sequence[Mapping[str, Any]] = (),
    fusion_fuser: ModelWithProcessor | None = None,
    batch_size: int = 16,
    limit: int | None = None,
) -> Iterator[str]:
    """Evaluate memory fusers on the same items, and yield the lines of one Markdown table.

    Facts are answered 10-way, 500 for each of three seeds; answers about passages are scored by log-likelihood per
    token. Called again with the same folder it continues an interrupted run.

    Args:
        fusers: Names and models with processors; methods that do not depend on the fuser run with the first one.
        folder: Gets a folder of answers for each fuser.
        passages: Rows of `id`, `sharer_context` and `messages`, see [`score_passages`]; may be empty.
        fusion_fuser: A fuser with `mode="fusion"`, for comparison.
        batch_size: Number of facts per batch.
        limit: Number of facts; `None`: all.
    """
    yield _row("", "private facts, % right", "passages, nats per token")
    yield _row("---", "---", "---")
    base_facts: dict[str, list[int]] = {}
    base_scores: dict[str, list[float]] = {}
    for name, fuser in fusers:
        is_first = not base_facts
        facts = _facts(fuser, folder / name, is_first, fusion_fuser if is_first else None, batch_size, limit)
        scores = _passages(fuser, folder / name / "passages.json", passages, is_first)
        if is_first:
            base_facts, base_scores = facts, scores
            for method, label in _BASELINES.items():
                if method in facts:
                    yield _row(label, _percent(facts[method]), _mean(scores.get(method)))
        facts, scores = {**base_facts, **facts}, {**base_scores, **scores}
        yield _row(f"**{name}**: sharer-only context", _percent(facts["c2c"]), _mean(scores.get("c2c")))
        mismatched = _percent(facts["mismatched"]), _mean(scores.get("mismatched"))
        yield _row("mismatched sharer-only context", *mismatched)
        for method, label in (("mismatched", "gain over mismatched"), ("receiver", "gain over the receiver")):
            gain = paired_difference(facts["c2c"], facts[method])
            low, high = (100 * end for end in gain.interval)
            compared = describe_difference(scores["c2c"], scores[method]) if scores else ""
            yield _row(label, f"{100 * gain.value:+.1f} [{low:+.1f}, {high:+.1f}]", compared)
        if scores:
            recovered = context_gain_recovered(scores)
            share = "not defined" if recovered is None else f"{recovered:.0%}"
            yield _row("share of the gain of the context in the prompt", "", share)


def _facts(
    fuser: ModelWithProcessor,
    folder: Path,
    is_first: bool,
    fusion_fuser: ModelWithProcessor | None,
    batch_size: int,
    limit: int | None,
) -> dict[str, list[int]]:
    """Return per method whether each item is right, in the order of the items."""
    methods = [*(["receiver", "receiver_with_context", "sharer"] if is_first else []), "c2c", "mismatched"]
    methods += [] if fusion_fuser is None else ["same_text_fusion"]
    evaluate(*fuser, folder, ["private_facts"], methods, batch_size=batch_size, limit=limit, fusion_fuser=fusion_fuser)
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    by_method = group_records(json.loads(line) for line in lines)["private_facts"]
    return {method: [found[item]["correct"] for item in sorted(found)] for method, found in by_method.items()}


def _passages(
    fuser: ModelWithProcessor, path: Path, rows: Sequence[Mapping[str, Any]], is_first: bool
) -> dict[str, list[float]]:
    """Return per method the score of every passage; those of an earlier call where it had the same ones."""
    if not rows:
        return {}
    methods = PASSAGE_METHODS if is_first else ("c2c", "mismatched")
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = [row["id"] for row in rows]
    if known.get("ids") != ids or not set(methods) <= known["scores"].keys():
        known = {"ids": ids, "scores": score_passages(*fuser, rows, methods)}
        write_json(path, known)
    return known["scores"]


def _percent(correct: Sequence[int]) -> str:
    low, high = wilson_interval(correct)
    return f"{100 * np.mean(correct):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _mean(values: Sequence[float] | None) -> str:
    return f"{np.mean(values):.3f}" if values else ""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
