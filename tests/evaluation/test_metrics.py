"""Intervals, tests and the metrics' modules, against numbers computed by hand and against scipy's definitions."""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_for_tests import NEEDS

pytest.importorskip("scipy", reason=NEEDS)

import evaluate  # noqa: E402

from c2c_hf.evaluation import metrics  # noqa: E402
from c2c_hf.evaluation.metrics.intervals import (  # noqa: E402
    bootstrap_interval,
    paired_difference,
    wilson_interval,
)
from c2c_hf.evaluation.metrics.performance_gap_recovered import gap_recovered  # noqa: E402

#: Inputs of every metric, and some of its outputs.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "accuracy": ({"predictions": [0, 2, 1, 1], "references": [0, 1, 1, 1]}, {"accuracy": 0.75, "num_items": 4}),
    "exact_match_f1": (
        {
            "predictions": ["The Hunter River.", "on the hunter river", "\u5e94\u4e3a\u5317\u4eac", "", "Jena"],
            "references": [["Coal", "Hunter River"], ["Hunter River"], ["\u5317\u4eac"], ["x"], ["in Jena"]],
        },
        # Of 3 tokens 2 are right, of 4 characters 2, of 2 tokens 1.
        {"exact_match": 0.2, "f1": pytest.approx((1 + 0.8 + 2 / 3 + 0 + 2 / 3) / 5), "num_items": 5},
    ),
    "pairing_gain": (
        {"predictions": [3, 1, 0, 2], "mismatched_predictions": [0, 1, 1, 1], "references": [3, 1, 0, 0]},
        {"pairing_gain": 0.5, "p_value": 0.5, "num_items": 4},
    ),
    "performance_gap_recovered": (
        {
            "predictions": [1, 1, 0, 0],
            "receiver_predictions": [1, 0, 0, 0],
            "sharer_predictions": [[1, 1], [0, 1], [0, 1], [0, 0]],
            "references": [1, 1, 1, 1],
        },
        {"performance_gap_recovered": 0.5, "num_items": 4},
    ),
}


@pytest.mark.parametrize(("right", "count"), [(0, 5), (7, 10), (300, 300)])
def test_wilson(right: int, count: int) -> None:
    z, share = 1.959963984540054, right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    assert wilson_interval([1] * right + [0] * (count - right)) == pytest.approx(
        (middle - half, middle + half), abs=1e-9
    )


def test_paired_difference() -> None:
    # 6 better, 1 worse, 13 alike.
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
    assert found.interval == bootstrap_interval(differences.tolist())


def test_methods_that_agree_everywhere() -> None:
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.value, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="3 results for the same items, at least one, but got 2"):
        paired_difference([1, 0, 1], [1, 0])


@pytest.mark.parametrize(
    ("fused", "receiver", "sharer", "expected"), [(0.5, 0.4, 0.6, 0.5), (0.3, 0.4, 0.6, -0.5), (0.5, 0.4, 0.3, None)]
)
def test_gap_recovered(fused: float, receiver: float, sharer: float, expected: float | None) -> None:
    assert gap_recovered(fused, receiver, sharer) == pytest.approx(expected)


def test_every_folder_is_a_metric() -> None:
    assert set(metrics.METRICS) == CASES.keys()
    for name in metrics.METRICS:
        assert (metrics.FOLDER / name / f"{name}.py").is_file()
    with pytest.raises(ValueError, match=re.escape("`name` must be one of ['accuracy', ") + ".*but got 'bleu'"):
        metrics.load("bleu")


@pytest.mark.parametrize("name", CASES)
def test_metrics(name: str) -> None:
    """Imported from the package, and with the batches added one by one."""
    inputs, expected = CASES[name]
    package = importlib.import_module(f"c2c_hf.evaluation.metrics.{name}")
    (metric_class,) = (
        value for value in vars(package).values() if isinstance(value, type) and issubclass(value, evaluate.Metric)
    )
    metric = metric_class(keep_in_memory=True)
    found = metric.compute(**inputs)
    assert {key: found[key] for key in expected} == expected
    for key, interval in found.items():
        if key.endswith("interval"):
            value = found[name if key == "interval" else key.removesuffix("_interval")]
            assert interval[0] <= value <= interval[1]
    assert metric.features.keys() == inputs.keys()
    for index in range(found["num_items"]):
        metric.add_batch(**{key: values[index : index + 1] for key, values in inputs.items()})
    assert metric.compute() == found


def test_a_sharer_is_needed_for_the_gap() -> None:
    inputs = {**CASES["performance_gap_recovered"][0], "sharer_predictions": [[], [], [], []]}
    with pytest.raises(ValueError, match="`sharer_predictions` must hold at least one prediction per item"):
        metrics.load("performance_gap_recovered").compute(**inputs)


def test_metrics_load_from_their_folders_without_a_network(tmp_path: Path) -> None:
    """In a new process, whose cache of modules is empty, and to which no connection is allowed."""
    code = (
        "import socket, sys\n"
        "def refuse(*arguments, **options): raise AssertionError('a connection was opened')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "import evaluate\n"
        "from c2c_hf.evaluation import metrics\n"
        f"cases = {[(name, inputs) for name, (inputs, _) in CASES.items()]!r}\n"
        "for name, inputs in cases:\n"
        "    found = evaluate.load(str(metrics.FOLDER / name)).compute(**inputs)\n"
        "    assert found == metrics.load(name).compute(**inputs)\n"
        "    print(name, found[next(iter(found))])\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_EVALUATE_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(metrics.FOLDER.parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line, (name, (_, expected)) in zip(done.stdout.splitlines(), CASES.items(), strict=True):
        found = line.split()
        assert found[0] == name and float(found[1]) == next(iter(expected.values()))
