"""Records -> results: accuracies with intervals, pairing gain, recovered gap, selective fusion, seconds and tokens."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from .methods.baselines import route_queries
from .metrics.accuracy import Accuracy
from .metrics.exact_match_f1 import ExactMatchF1
from .metrics.intervals import paired_difference
from .metrics.pairing_gain import PairingGain
from .metrics.performance_gap_recovered import PerformanceGapRecovered
from .metrics.selective_fusion import selective_fusion
from .run_records import Json, Record, group_records

#: One method's records by item id.
Records: TypeAlias = Mapping[str, Record]

#: What may decide where to fuse: a record's field, the method whose records hold it, and the signs that
#: `selective_fusion` tries: small confidences are fused; large gate weights, or small ones.
SIGNALS = {"confidence": ("receiver", (1,)), "gate_weight": ("c2c", (-1, 1))}
_SECONDS = ("total", "sharer", "fusion", "prefill", "decode")


def compute_results(
    records: Sequence[Record], methods: Sequence[str], strongest_sharer: str = "sharer", seed: int = 0
) -> dict[str, list[Json]]:
    """Compute the figures of `metrics.json`.

    Args:
        records: Of all tasks and methods.
        methods: Which of them count, in order; `"routing"` is computed here.
        strongest_sharer: The sharer that `"routing"` sends hard questions to.
        seed: Of the bootstrap.

    Returns:
        `results`: per task, method and metric its value, interval, number of items and of failed ones, and for
        accuracies the number without an extracted answer, seconds and tokens per item, and differences to other
        methods (`mismatched_answer` is the share of answers that are those of the questions which the mismatched
        sharer prefills, where the task's data name them); `pairing_gain`: C2C less the mismatched-sharer control;
        `performance_gap_recovered`, per task; `selective_fusion`, per task and signal, see
        [`~metrics.selective_fusion.selective_fusion`].
    """
    results: dict[str, list[Json]] = {
        "results": [],
        "pairing_gain": [],
        "performance_gap_recovered": [],
        "selective_fusion": [],
    }
    for task, by_method in group_records(records).items():
        if "routing" in methods and {"receiver", strongest_sharer} <= by_method.keys():
            by_method["routing"] = route_queries(by_method["receiver"], by_method[strongest_sharer])
        present = {method: by_method[method] for method in methods if method in by_method}
        for method in present:
            results["results"] += [{"task": task, **row} for row in _method_results(method, present, seed)]
        if {"c2c", "mismatched"} <= present.keys():
            results["pairing_gain"].append(
                {"task": task, **_pairing_gain(present["c2c"], present["mismatched"], seed)}
            )
        sharers = [method for method in present if method.split("_")[0] == "sharer"]
        if {"c2c", "receiver"} <= present.keys() and sharers:
            results["performance_gap_recovered"].append({"task": task, "value": _gap_recovered(present, sharers)})
        if {"c2c", "receiver"} <= present.keys():
            for signal in SIGNALS:
                found = compute_selective_fusion(present["receiver"], present["c2c"], signal, seed)
                results["selective_fusion"] += [] if found is None else [{"task": task, **found}]
    return results


def _method_results(method: str, present: Mapping[str, Records], seed: int) -> list[Json]:
    """Return a row for each metric of one method on one task."""
    answered = list(present[method].values())
    num_failed = sum("error" in record for record in answered)
    rows: list[Json] = []
    columns = {"accuracy": "correct", "accuracy_strict": "correct_strict", "mismatched_answer": "mismatched"}
    for metric, column in columns.items():
        if metric != "accuracy" and not any(column in record for record in answered):
            continue
        # A failed item has no such column, and is wrong.
        correct = [record.get(column, 0) for record in answered]
        found = Accuracy(keep_in_memory=True).compute(predictions=correct, references=[1] * len(correct))
        row = {
            "method": method,
            "metric": metric,
            "value": found["accuracy"],
            "interval": found["interval"],
            "num_items": found["num_items"],
            "num_failed": num_failed,
            "num_without_answer": sum(record.get("prediction") is None for record in answered),
            "seconds": _seconds(answered),
            "tokens": _tokens(answered),
        }
        others = ["receiver", "fusion_off"] if method == "c2c" else ["receiver"]
        for other in others:
            if other in present and method != other:
                row[f"gain_over_{other}"] = _gain(present[method], present[other], column, seed)
        rows.append(row)
    if all("accepted_answers" in record for record in answered):
        # A failed item has no text.
        texts = [record.get("text", "") for record in answered]
        accepted = [record["accepted_answers"] for record in answered]
        found = ExactMatchF1(keep_in_memory=True).compute(predictions=texts, references=accepted, seed=seed)
        for metric in ("exact_match", "f1"):
            row = {"method": method, "metric": metric, "value": found[metric], "interval": found[f"{metric}_interval"]}
            rows.append({**row, "num_items": found["num_items"], "num_failed": num_failed})
    return rows


def _correct(records: Sequence[Records], column: str = "correct") -> list[list[int]]:
    """Return per method whether each item is right, on the items that all methods answered."""
    common = sorted(set.intersection(*(set(by_item) for by_item in records)))
    return [[by_item[item].get(column, 0) for item in common] for by_item in records]


def _pairing_gain(c2c: Records, mismatched: Records, seed: int) -> Json:
    correct, mismatched_correct = _correct([c2c, mismatched])
    found = PairingGain(keep_in_memory=True).compute(
        predictions=correct,
        mismatched_predictions=mismatched_correct,
        references=[1] * len(correct),
        seed=seed,
    )
    return {"value": found.pop("pairing_gain"), **found}


def _gap_recovered(present: Mapping[str, Records], sharers: Sequence[str]) -> float | None:
    fused, receiver, *by_sharer = _correct([present[method] for method in ("c2c", "receiver", *sharers)])
    found = PerformanceGapRecovered(keep_in_memory=True).compute(
        predictions=fused,
        receiver_predictions=receiver,
        sharer_predictions=[list(values) for values in zip(*by_sharer, strict=True)],
        references=[1] * len(fused),
    )
    return found["performance_gap_recovered"]


def _gain(records: Records, others: Records, column: str, seed: int) -> Json:
    """Compare two methods on the items that both answered."""
    correct, other_correct = _correct([records, others], column)
    difference = paired_difference(correct, other_correct, seed)
    return {**difference._asdict(), "interval": list(difference.interval)}


def compute_selective_fusion(
    receiver: Records, fused: Records, signal: str = "confidence", seed: int = 0
) -> Json | None:
    """Compute the accuracy if only some items were fused, see [`~metrics.selective_fusion.selective_fusion`].

    Args:
        receiver: Its records, with `confidence`, its probability of its own answer.
        fused: Those of C2C, with `gate_weight`.
        signal: Of `SIGNALS`.
        seed: Of the halves.

    Returns:
        `None` without the signal, as generated answers have no confidence, or with fewer than four items.
    """
    both = sorted(receiver.keys() & fused.keys())
    method, signs = SIGNALS[signal]
    holders = {"receiver": receiver, "c2c": fused}[method]
    if len(both) < 4 or any(signal not in holders[item] and "error" not in holders[item] for item in both):
        return None
    # A failed item counts as one of no confidence, or of closed gates.
    values = [holders[item].get(signal, 0.0) for item in both]
    receiver_correct, fused_correct = _correct([receiver, fused])
    return {"signal": signal, **selective_fusion(receiver_correct, fused_correct, values, signs, seed)}


def _seconds(records: Sequence[Record]) -> dict[str, float]:
    """Return the median seconds per item, in total and by stage."""
    return {name: statistics.median(record["seconds"][name] for record in records) for name in _SECONDS}


def _tokens(records: Sequence[Record]) -> dict[str, float]:
    """Return the median numbers of prompt tokens and generated tokens per item, where answers were generated."""
    columns = {"prompt": "prompt_tokens", "generated": "num_tokens"}
    counted = [record for record in records if "prompt_tokens" in record]
    return {
        name: statistics.median(record[column] for record in counted) for name, column in columns.items() if counted
    }
