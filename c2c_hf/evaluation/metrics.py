"""Predictions -> accuracies with intervals, pairing gain, recovered gap, seconds and tokens."""

import statistics
from collections.abc import Sequence
from typing import Any

from .abstention import SIGNALS, abstention
from .intervals import accuracy_interval, paired_difference, performance_gap_recovered
from .records import Record

#: Parts of an item's time, as in [`answering.Seconds`].
_SECONDS = ("total", "sharer", "fusion", "prefill", "decode")


def group_records(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Record]]]:
    """Sort records by task, method and item."""
    grouped: dict[str, dict[str, dict[str, Record]]] = {}
    for record in records:
        grouped.setdefault(record["task"], {}).setdefault(record["method"], {})[record["id"]] = record
    return grouped


def route(receiver: dict[str, Record], sharer: dict[str, Record]) -> dict[str, Record]:
    """Answer by the receiver where it is sure, by the sharer for the other half of the questions.

    Args:
        receiver: Its records by item, with `confidence`.
        sharer: The stronger model's.

    Raises:
        ValueError: The receiver's records hold no confidence, as with written answers.
    """
    both = sorted(receiver.keys() & sharer.keys())
    failed = {item: "error" in receiver[item] for item in both}
    if any("confidence" not in receiver[item] and not failed[item] for item in both):
        raise ValueError(
            "`methods`: 'routing' compares choices' likelihoods, which a task with written answers lacks."
        )
    ordered = sorted(both, key=lambda item: (receiver[item].get("confidence", 0.0), item))
    hard = set(ordered[: len(ordered) // 2])
    routed = {}
    for item in both:
        chosen = sharer[item] if item in hard else receiver[item]
        routed[item] = {**chosen, "method": "routing"}
        if item in hard:
            # The receiver has read the question to know that it is hard.
            spent, more = receiver[item]["seconds"], chosen["seconds"]
            routed[item]["seconds"] = {name: spent[name] + more[name] for name in _SECONDS}
    return routed


def compute_metrics(
    records: Sequence[Record], methods: Sequence[str], strongest_sharer: str = "sharer", seed: int = 0
) -> dict[str, Any]:
    """Compute what `metrics.json` holds.

    Args:
        records: Of all tasks and methods.
        methods: Which of them count, in order; `"routing"` is worked out here.
        strongest_sharer: The sharer that `"routing"` sends hard questions to.
        seed: Of the bootstrap.

    Returns:
        `results`: per task, method and metric its value, interval, number of items, failed and unreadable ones,
        seconds and tokens per item, the difference to the receiver and that of C2C to itself with fusion off;
        `pairing_gain`: C2C minus mismatched C2C; `performance_gap_recovered`, per task; `abstention`, per task
        and signal, see [`~abstention.abstention`].
    """
    results: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    recovered: list[dict[str, Any]] = []
    abstentions: list[dict[str, Any]] = []
    for task, by_method in group_records(records).items():
        if "routing" in methods and {"receiver", strongest_sharer} <= by_method.keys():
            by_method["routing"] = route(by_method["receiver"], by_method[strongest_sharer])
        present = [method for method in methods if method in by_method]
        accuracies = {}
        for method in present:
            answered = list(by_method[method].values())
            for metric, column in (("accuracy", "correct"), ("accuracy_strict", "correct_strict")):
                if metric != "accuracy" and not any(column in record for record in answered):
                    continue
                # A failed item has no such column, and is wrong.
                correct = [record.get(column, 0) for record in answered]
                result = {
                    "task": task,
                    "method": method,
                    "metric": metric,
                    "value": sum(correct) / len(correct),
                    "interval": list(accuracy_interval(correct)),
                    "num_items": len(correct),
                    "num_failed": sum("error" in record for record in answered),
                    "num_unreadable": sum(record.get("prediction") is None for record in answered),
                    "seconds": _seconds(answered),
                    "tokens": _tokens(answered),
                }
                for other in ("receiver", "alone"):
                    if other in present and method != other and (other == "receiver" or method == "c2c"):
                        result[f"gain_over_{other}"] = _gain(by_method[method], by_method[other], column, seed)
                results.append(result)
                if metric == "accuracy":
                    accuracies[method] = result["value"]
        if {"c2c", "mismatched"} <= set(present):
            gains.append({"task": task, **_gain(by_method["c2c"], by_method["mismatched"], "correct", seed)})
        if {"c2c", "receiver"} <= set(present):
            for signal in SIGNALS:
                found = abstention(by_method["receiver"], by_method["c2c"], signal, seed)
                abstentions += [] if found is None else [{"task": task, **found}]
        sharers = [value for method, value in accuracies.items() if method.split("_")[0] == "sharer"]
        if {"c2c", "receiver"} <= accuracies.keys() and sharers:
            value = performance_gap_recovered(accuracies["c2c"], accuracies["receiver"], sharers)
            recovered.append({"task": task, "value": value})
    return {
        "results": results,
        "pairing_gain": gains,
        "performance_gap_recovered": recovered,
        "abstention": abstentions,
    }


def _gain(records: dict[str, Record], others: dict[str, Record], column: str, seed: int) -> dict[str, Any]:
    """Compare two methods on the items that both answered."""
    both = sorted(records.keys() & others.keys())
    difference = paired_difference(
        [records[item].get(column, 0) for item in both], [others[item].get(column, 0) for item in both], seed
    )
    return {
        "value": difference.value,
        "interval": list(difference.interval),
        "num_items": difference.num_items,
        "p_value": difference.p_value,
    }


def _seconds(records: Sequence[Record]) -> dict[str, float]:
    """Return the median seconds per item, of the whole and of its parts."""
    return {name: statistics.median(record["seconds"][name] for record in records) for name in _SECONDS}


def _tokens(records: Sequence[Record]) -> dict[str, float]:
    """Return the median numbers of tokens that were read and written for an item, where answers were written."""
    columns = {"read": "prompt_tokens", "written": "num_tokens"}
    counted = [record for record in records if "prompt_tokens" in record]
    return {
        name: statistics.median(record[column] for record in counted) for name, column in columns.items() if counted
    }
