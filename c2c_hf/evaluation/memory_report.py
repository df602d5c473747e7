"""Memory fusers in one table: made-up facts and real passages that only the sharer has read."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .evaluate import evaluate
from .intervals import accuracy_interval, paired_difference
from .metrics import group_records
from .passages import score_difference, score_passages, share_of_reading
from .records import write_json

Pair = tuple[C2CForCausalLM, C2CProcessor]

#: What nobody's fuser changes: the method for facts, the condition for passages, and its words.
_BASELINES = (
    ("receiver", "none", "nobody has read it"),
    ("reader", "reading", "the receiver reads it"),
    ("sharer", "", "the sharer reads it, and answers"),
    ("fusion", "", "the sharer reads it, a fuser of the other mode fuses the question"),
)


def memory_report(
    fusers: Iterable[tuple[str, Pair]],
    folder: Path,
    passages: Sequence[Mapping[str, Any]] = (),
    fusion_fuser: Pair | None = None,
    batch_size: int = 16,
    limit: int | None = None,
) -> Iterator[str]:
    """Evaluate memory fusers on the same items, and hand out the lines of one Markdown table.

    Facts are answered 10-way, 500 for each of three seeds; answers about passages are scored by log-likelihood per
    token. Called again with the same folder it goes on where it was interrupted.

    Args:
        fusers: Names and pairs; what does not depend on the fuser is done by the first one.
        folder: Takes a folder of answers for each of them.
        passages: Rows of `id`, `sharer_context` and `messages`, see [`~passages.score_passages`]; may be empty.
        fusion_fuser: A pair with `mode="fusion"`, for comparison.
        batch_size: Facts read together.
        limit: Number of facts; `None`: all.
    """
    yield from ("| | made-up facts, % right | passages, nats per token |", "| --- | --- | --- |")
    base_facts: dict[str, list[int]] = {}
    base_scores: dict[str, list[float]] = {}
    for name, pair in fusers:
        is_first = not base_facts
        facts = _facts(pair, folder / name, is_first, fusion_fuser if is_first else None, batch_size, limit)
        scores = _passages(pair, folder / name / "passages.json", passages, is_first)
        if is_first:
            base_facts, base_scores = facts, scores
            for method, condition, words in _BASELINES:
                if method in facts:
                    yield _line(words, _percent(facts[method]), _mean(scores.get(condition)))
        facts, scores = {**base_facts, **facts}, {**base_scores, **scores}
        yield _line(f"**{name}**: the sharer reads it", _percent(facts["c2c"]), _mean(scores.get("right")))
        yield _line("the sharer reads another one", _percent(facts["mismatched"]), _mean(scores.get("mismatched")))
        for words, method, condition in (("another", "mismatched", "mismatched"), ("none", "receiver", "none")):
            gain = paired_difference(facts["c2c"], facts[method])
            low, high = gain.interval
            compared = score_difference(scores["right"], scores[condition]) if scores else ""
            yield _line(
                f"right over {words}", f"{100 * gain.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", compared
            )
        if scores:
            yield _line("share of what reading gains", "", f"{share_of_reading(scores):.0%}")


def _facts(
    pair: Pair, folder: Path, is_first: bool, fusion_fuser: Pair | None, batch_size: int, limit: int | None
) -> dict[str, list[int]]:
    """Return per method whether each item was answered rightly, in one order."""
    methods = [*(["receiver", "reader", "sharer"] if is_first else []), "c2c", "mismatched"]
    methods += [] if fusion_fuser is None else ["fusion"]
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "fusion_fuser": fusion_fuser}
    evaluate(*pair, folder, ["private_facts"], methods, **options)
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    by_method = group_records([json.loads(line) for line in lines])["private_facts"]
    return {method: [found[item]["correct"] for item in sorted(found)] for method, found in by_method.items()}


def _passages(pair: Pair, path: Path, rows: Sequence[Mapping[str, Any]], is_first: bool) -> dict[str, list[float]]:
    """Return per condition the score of every passage; those of an earlier call where it had the same ones."""
    if not rows:
        return {}
    conditions = ["right", "mismatched", *(["none", "reading"] if is_first else [])]
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ids = [row["id"] for row in rows]
    if known.get("ids") != ids or not set(conditions) <= known["scores"].keys():
        known = {"ids": ids, "scores": score_passages(*pair, rows, conditions)}
        write_json(path, known)
    return known["scores"]


def _percent(correct: Sequence[int]) -> str:
    low, high = accuracy_interval(correct)
    return f"{100 * np.mean(correct):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _mean(values: Sequence[float] | None) -> str:
    return f"{np.mean(values):.3f}" if values else ""


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
