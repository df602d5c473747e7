"""The numbers of `metrics.json`, against numbers computed by hand."""

import numpy as np
import pytest
from evaluation_for_tests import NEEDS

pytest.importorskip("scipy", reason=NEEDS)

from c2c_hf.evaluation.methods.baselines import route_queries  # noqa: E402
from c2c_hf.evaluation.results import compute_results, compute_selective_fusion  # noqa: E402

SECONDS = {"total": 1.0, "sharer": 0.25, "fusion": 0.25, "prefill": 0.25, "decode": 0.25}


def records(method: str, correct: list[int], **more) -> list[dict]:
    return [
        {"task": "arc", "method": method, "id": f"q{i}", "correct": c, "prediction": c, "seconds": SECONDS, **more}
        for i, c in enumerate(correct)
    ]


def test_results() -> None:
    answered = [
        *records("receiver", [0, 0, 0, 1]),
        *records("sharer", [1, 1, 0, 1]),
        *records("c2c", [1, 1, 0, 1]),
        *records("fusion_off", [0, 0, 1, 1]),
        *records("mismatched", [1, 0, 0, 1]),
    ]
    # A failed item has no prediction, and counts.
    answered[-1] = {**answered[-1], "correct": 0, "prediction": None, "error": "RuntimeError: ..."}
    metrics = compute_results(answered, ["receiver", "sharer", "c2c", "fusion_off", "mismatched"])
    by_method = {result["method"]: result for result in metrics["results"]}
    assert [by_method[m]["value"] for m in ("receiver", "sharer", "c2c", "mismatched")] == [0.25, 0.75, 0.75, 0.25]
    assert all(result["num_items"] == 4 and result["metric"] == "accuracy" for result in metrics["results"])
    assert (by_method["mismatched"]["num_failed"], by_method["mismatched"]["num_without_answer"]) == (1, 1)
    assert "gain_over_receiver" not in by_method["receiver"]
    assert by_method["c2c"]["gain_over_receiver"]["value"] == 0.5
    assert by_method["c2c"]["gain_over_fusion_off"]["value"] == 0.25
    assert [method for method, result in by_method.items() if "gain_over_fusion_off" in result] == ["c2c"]
    assert by_method["c2c"]["seconds"] == SECONDS
    (gain,) = metrics["pairing_gain"]
    assert (gain["task"], gain["value"], gain["num_items"]) == ("arc", 0.5, 4)
    assert gain["interval"][0] <= 0.5 <= gain["interval"][1]
    assert metrics["performance_gap_recovered"] == [{"task": "arc", "value": 1.0}]


def test_strict_accuracy_is_a_result_of_its_own() -> None:
    answered = records("receiver", [1, 1, 0], correct_strict=0)
    answered[0]["correct_strict"] = 1
    answered.append({**answered[0], "id": "failed", "correct": 0, "prediction": None, "error": "ValueError: ..."})
    del answered[-1]["correct_strict"]
    answered[0] |= {"prompt_tokens": 50, "num_tokens": 4}
    answered[1] |= {"prompt_tokens": 60, "num_tokens": 2}
    results = compute_results(answered, ["receiver"])["results"]
    assert results[0]["tokens"] == {"prompt": 55, "generated": 3}
    assert {result["metric"]: result["value"] for result in results} == {"accuracy": 0.5, "accuracy_strict": 0.25}
    assert all(result["num_items"] == 4 for result in results)


def test_answers_of_the_mismatched_question() -> None:
    answered = [*records("c2c", [1, 0], mismatched=0), *records("mismatched", [0, 0], mismatched=1)]
    results = compute_results(answered, ["c2c", "mismatched"])["results"]
    named = {result["method"]: result["value"] for result in results if result["metric"] == "mismatched_answer"}
    assert named == {"c2c": 0.0, "mismatched": 1.0}


def test_pairing_gain_is_taken_over_the_same_items() -> None:
    answered = [*records("c2c", [1, 1, 1, 0]), *records("mismatched", [0, 1])]
    (gain,) = compute_results(answered, ["c2c", "mismatched"])["pairing_gain"]
    assert (gain["value"], gain["num_items"]) == (0.5, 2)


def test_routing_sends_the_unsure_half() -> None:
    receiver = {
        r["id"]: {**r, "confidence": 0.9 - 0.1 * i} for i, r in enumerate(records("receiver", [1, 0, 0, 0, 1]))
    }
    sharer = {r["id"]: r for r in records("sharer", [0, 0, 1, 1, 1])}
    routed = route_queries(receiver, sharer)
    assert [routed[f"q{i}"]["correct"] for i in range(5)] == [1, 0, 0, 1, 1]
    assert routed["q4"]["seconds"]["total"] == 2.0
    assert routed["q0"]["seconds"]["total"] == 1.0
    metrics = compute_results([*receiver.values(), *sharer.values()], ["receiver", "sharer", "routing"])
    assert {r["method"]: r["value"] for r in metrics["results"]}["routing"] == 0.6
    with pytest.raises(ValueError, match="'routing' compares choices' likelihoods"):
        route_queries({r["id"]: r for r in records("receiver", [1, 0])}, sharer)


def test_selective_fusion() -> None:
    """Where the receiver's confidence tells which of both is right, every item is."""

    def with_confidence(correct: list[int], confidence: list[float]) -> dict[str, dict]:
        made = records("x", correct)
        return {record["id"]: {**record, "confidence": c} for record, c in zip(made, confidence, strict=True)}

    receiver_correct, fused = [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]
    sure = [0.9, 0.92, 0.94, 0.96, 0.1, 0.12, 0.14, 0.16]
    found = compute_selective_fusion(with_confidence(receiver_correct, sure), with_confidence(fused, sure))
    assert found is not None
    assert found["oracle"] == found["calibrated"]["value"] == 1.0 and found["calibrated"]["share_fused"] == 0.5
    curve = dict(found["curve"])
    assert (curve[0.0], curve[0.5], curve[1.0]) == (0.5, 1.0, 0.5)
    always = compute_selective_fusion(with_confidence([0] * 8, sure), with_confidence([1] * 8, sure))
    never = compute_selective_fusion(with_confidence([1] * 8, sure), with_confidence([0] * 8, sure))
    assert always is not None and never is not None
    assert always["calibrated"]["share_fused"] == 1.0 and never["calibrated"]["share_fused"] == 0.0
    generator = np.random.default_rng(3)
    random = [generator.integers(0, 2, 40).tolist() for _ in range(2)]
    unsure = generator.random(40).tolist()
    found = compute_selective_fusion(with_confidence(random[0], unsure), with_confidence(random[1], unsure))
    assert found is not None and found["calibrated"]["value"] <= found["oracle"]
    assert (
        compute_selective_fusion({r["id"]: r for r in records("x", receiver_correct)}, with_confidence(fused, sure))
        is None
    )
    metrics = compute_results(
        [
            *({**r, "confidence": 0.5} for r in records("receiver", receiver_correct)),
            *records("c2c", fused),
        ],
        ["receiver", "c2c"],
    )
    assert [(entry["task"], entry["signal"]) for entry in metrics["selective_fusion"]] == [("arc", "confidence")]


@pytest.mark.parametrize("helps", ["large weights", "small weights"])
def test_selective_fusion_by_gate_weights(helps: str) -> None:
    """Whether large or small gate weights are fused is chosen on the other half of the items."""
    receiver_correct, fused = [1, 0] * 10, [0, 1] * 10
    weights = [0.3, 0.6] * 10 if helps == "large weights" else [0.6, 0.3] * 10
    made = {r["id"]: {**r, "gate_weight": w} for r, w in zip(records("c2c", fused), weights, strict=True)}
    receiver = {r["id"]: {**r, "confidence": 0.5} for r in records("receiver", receiver_correct)}
    found = compute_selective_fusion(receiver, made, "gate_weight")
    assert found is not None
    assert (found["calibrated"]["value"], found["calibrated"]["share_fused"]) == (1.0, 0.5)
    assert dict(found["curve"])[0.5] == (1.0 if helps == "large weights" else 0.0)
    assert compute_selective_fusion(receiver, {r["id"]: r for r in records("c2c", fused)}, "gate_weight") is None
    metrics = compute_results([*receiver.values(), *made.values()], ["receiver", "c2c"])
    assert [entry["signal"] for entry in metrics["selective_fusion"]] == ["confidence", "gate_weight"]


def test_generated_words_have_exact_match_and_f1() -> None:
    texts = ["The Hunter River.", "hunter rivers", ""]
    answered = [
        {**record, "correct_strict": record["correct"], "text": text, "accepted_answers": ["Hunter River"]}
        for record, text in zip(records("c2c", [1, 0, 0]), texts, strict=True)
    ]
    answered[2]["error"] = "ValueError: ..."
    del answered[2]["text"], answered[2]["correct_strict"]
    results = {result["metric"]: result for result in compute_results(answered, ["c2c"])["results"]}
    assert [results[metric]["value"] for metric in ("accuracy", "exact_match", "f1")] == [1 / 3, 1 / 3, 0.5]
    assert results["exact_match"]["interval"] == results["accuracy_strict"]["interval"]
    assert results["f1"]["interval"][0] <= 0.5 <= results["f1"]["interval"][1]
    assert (results["f1"]["num_items"], results["f1"]["num_failed"]) == (3, 1)
