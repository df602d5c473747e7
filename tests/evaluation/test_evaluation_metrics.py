"""Intervals, tests and the numbers of `metrics.json`, against numbers worked out by hand."""

import math

import numpy as np
import pytest
from evaluation_for_tests import NEEDS

pytest.importorskip("scipy", reason=NEEDS)

from c2c_hf.evaluation.abstention import abstention  # noqa: E402
from c2c_hf.evaluation.intervals import (  # noqa: E402
    accuracy_interval,
    paired_difference,
    performance_gap_recovered,
)
from c2c_hf.evaluation.metrics import compute_metrics, route  # noqa: E402

SECONDS = {"total": 1.0, "sharer": 0.25, "fusion": 0.25, "prefill": 0.25, "decode": 0.25}


def records(method: str, correct: list[int], **more) -> list[dict]:
    return [
        {"task": "arc", "method": method, "id": f"q{i}", "correct": c, "prediction": c, "seconds": SECONDS, **more}
        for i, c in enumerate(correct)
    ]


@pytest.mark.parametrize(("right", "count"), [(0, 5), (7, 10), (300, 300)])
def test_wilson(right: int, count: int) -> None:
    z, share = 1.959963984540054, right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    assert accuracy_interval([1] * right + [0] * (count - right)) == pytest.approx(
        (middle - half, middle + half), abs=1e-9
    )


def test_paired_difference() -> None:
    # 6 won, 1 lost, 13 alike.
    first, second = [1] * 6 + [0] + [1] * 13, [0] * 6 + [1] + [1] * 13
    found = paired_difference(first, second)
    assert found.value == pytest.approx(5 / 20)
    assert found.num_items == 20
    # Of 7 disagreements at least 6 for one side, both sides.
    assert found.p_value == pytest.approx(2 * (7 + 1) / 2**7)
    rng = np.random.default_rng(1)
    differences = np.subtract(first, second)
    means = rng.choice(differences, (20_000, 20)).mean(1)
    assert found.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.051)
    assert found == paired_difference(first, second), "the same seed gives the same interval"


def test_methods_that_agree_everywhere() -> None:
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.value, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="3 results for the same items, at least one, got 2"):
        paired_difference([1, 0, 1], [1, 0])


@pytest.mark.parametrize(
    ("fused", "receiver", "sharers", "expected"),
    [(0.5, 0.4, [0.6], 0.5), (0.3, 0.4, [0.5, 0.6], -0.5), (0.5, 0.4, [0.3], None), (0.5, 0.4, [], None)],
)
def test_gap_recovered(fused: float, receiver: float, sharers: list[float], expected: float | None) -> None:
    assert performance_gap_recovered(fused, receiver, sharers) == pytest.approx(expected)


def test_metrics() -> None:
    answered = [
        *records("receiver", [0, 0, 0, 1]),
        *records("sharer", [1, 1, 0, 1]),
        *records("c2c", [1, 1, 0, 1]),
        *records("alone", [0, 0, 1, 1]),
        *records("mismatched", [1, 0, 0, 1]),
    ]
    # A failure has no prediction, and stays in the denominator.
    answered[-1] = {**answered[-1], "correct": 0, "prediction": None, "error": "RuntimeError: ..."}
    metrics = compute_metrics(answered, ["receiver", "sharer", "c2c", "alone", "mismatched"])
    by_method = {result["method"]: result for result in metrics["results"]}
    assert [by_method[m]["value"] for m in ("receiver", "sharer", "c2c", "mismatched")] == [0.25, 0.75, 0.75, 0.25]
    assert all(result["num_items"] == 4 and result["metric"] == "accuracy" for result in metrics["results"])
    assert (by_method["mismatched"]["num_failed"], by_method["mismatched"]["num_unreadable"]) == (1, 1)
    assert "gain_over_receiver" not in by_method["receiver"]
    assert by_method["c2c"]["gain_over_receiver"]["value"] == 0.5
    assert by_method["c2c"]["gain_over_alone"]["value"] == 0.25
    assert [method for method, result in by_method.items() if "gain_over_alone" in result] == ["c2c"]
    assert by_method["c2c"]["seconds"] == SECONDS
    (gain,) = metrics["pairing_gain"]
    assert (gain["task"], gain["value"], gain["num_items"]) == ("arc", 0.5, 4)
    assert gain["interval"][0] <= 0.5 <= gain["interval"][1]
    assert metrics["performance_gap_recovered"] == [{"task": "arc", "value": 1.0}]


def test_strict_and_lenient_stand_side_by_side() -> None:
    answered = records("receiver", [1, 1, 0], correct_strict=0)
    answered[0]["correct_strict"] = 1
    answered.append({**answered[0], "id": "failed", "correct": 0, "prediction": None, "error": "ValueError: ..."})
    del answered[-1]["correct_strict"]
    answered[0] |= {"prompt_tokens": 50, "num_tokens": 4}
    answered[1] |= {"prompt_tokens": 60, "num_tokens": 2}
    results = compute_metrics(answered, ["receiver"])["results"]
    assert results[0]["tokens"] == {"read": 55, "written": 3}
    assert {result["metric"]: result["value"] for result in results} == {"accuracy": 0.5, "accuracy_strict": 0.25}
    assert all(result["num_items"] == 4 for result in results)


def test_pairing_gain_is_taken_over_the_same_items() -> None:
    answered = [*records("c2c", [1, 1, 1, 0]), *records("mismatched", [0, 1])]
    (gain,) = compute_metrics(answered, ["c2c", "mismatched"])["pairing_gain"]
    assert (gain["value"], gain["num_items"]) == (0.5, 2)


def test_routing_sends_the_unsure_half() -> None:
    receiver = {
        r["id"]: {**r, "confidence": 0.9 - 0.1 * i} for i, r in enumerate(records("receiver", [1, 0, 0, 0, 1]))
    }
    sharer = {r["id"]: r for r in records("sharer", [0, 0, 1, 1, 1])}
    routed = route(receiver, sharer)
    assert [routed[f"q{i}"]["correct"] for i in range(5)] == [1, 0, 0, 1, 1]
    assert routed["q4"]["seconds"]["total"] == 2.0
    assert routed["q0"]["seconds"]["total"] == 1.0
    metrics = compute_metrics([*receiver.values(), *sharer.values()], ["receiver", "sharer", "routing"])
    assert {r["method"]: r["value"] for r in metrics["results"]}["routing"] == 0.6
    with pytest.raises(ValueError, match="'routing' compares choices' likelihoods"):
        route({r["id"]: r for r in records("receiver", [1, 0])}, sharer)


def test_abstention() -> None:
    """Where the receiver's confidence tells who is right, all is got."""

    def with_confidence(correct: list[int], confidence: list[float]) -> dict[str, dict]:
        made = records("x", correct)
        return {record["id"]: {**record, "confidence": c} for record, c in zip(made, confidence, strict=True)}

    alone, fused = [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]
    sure = [0.9, 0.92, 0.94, 0.96, 0.1, 0.12, 0.14, 0.16]
    found = abstention(with_confidence(alone, sure), with_confidence(fused, sure))
    assert found is not None
    assert found["oracle"] == found["calibrated"]["value"] == 1.0 and found["calibrated"]["share_fused"] == 0.5
    curve = dict(found["curve"])
    assert (curve[0.0], curve[0.5], curve[1.0]) == (0.5, 1.0, 0.5)
    always = abstention(with_confidence([0] * 8, sure), with_confidence([1] * 8, sure))
    never = abstention(with_confidence([1] * 8, sure), with_confidence([0] * 8, sure))
    assert always is not None and never is not None
    assert always["calibrated"]["share_fused"] == 1.0 and never["calibrated"]["share_fused"] == 0.0
    generator = np.random.default_rng(3)
    random = [generator.integers(0, 2, 40).tolist() for _ in range(2)]
    unsure = generator.random(40).tolist()
    found = abstention(with_confidence(random[0], unsure), with_confidence(random[1], unsure))
    assert found is not None and found["calibrated"]["value"] <= found["oracle"]
    assert abstention({r["id"]: r for r in records("x", alone)}, with_confidence(fused, sure)) is None
    metrics = compute_metrics(
        [
            *({**r, "confidence": 0.5} for r in records("receiver", alone)),
            *records("c2c", fused),
        ],
        ["receiver", "c2c"],
    )
    assert [(entry["task"], entry["signal"]) for entry in metrics["abstention"]] == [("arc", "confidence")]


@pytest.mark.parametrize("helps", ["wide gates", "narrow gates"])
def test_abstention_by_gates(helps: str) -> None:
    """Whether wide gates speak for fusing or against it is found out on the other half of the items."""
    alone, fused = [1, 0] * 10, [0, 1] * 10
    weights = [0.3, 0.6] * 10 if helps == "wide gates" else [0.6, 0.3] * 10
    made = {r["id"]: {**r, "gate_weight": w} for r, w in zip(records("c2c", fused), weights, strict=True)}
    receiver = {r["id"]: {**r, "confidence": 0.5} for r in records("receiver", alone)}
    found = abstention(receiver, made, "gate_weight")
    assert found is not None
    assert (found["calibrated"]["value"], found["calibrated"]["share_fused"]) == (1.0, 0.5)
    assert dict(found["curve"])[0.5] == (1.0 if helps == "wide gates" else 0.0)
    assert abstention(receiver, {r["id"]: r for r in records("c2c", fused)}, "gate_weight") is None
    metrics = compute_metrics([*receiver.values(), *made.values()], ["receiver", "c2c"])
    assert [entry["signal"] for entry in metrics["abstention"]] == ["confidence", "gate_weight"]
