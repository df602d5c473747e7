"""The benchmark times what it says: the same work, the same logits, and every part of the floor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_c2c, tiny_model

from c2c_hf import benchmark_runs
from c2c_hf.benchmarks.measure import (
    Rounds,
    benchmark_prefill,
    benchmark_training_step,
    fuser_products,
    open_gates,
    peak_memory,
    random_prompt,
    time_in_turn,
)
from c2c_hf.benchmarks.runs import PARTS, plot_cost, run_benchmark


def test_rounds() -> None:
    rounds = Rounds({"a": [1.0, 2.0, 9.0], "b": [1.0, 1.0, 3.0], "c": [1.0, 1.0, 1.5]})
    assert rounds.median("a") == 2.0 and rounds.spread("a") == (1.0, 9.0)
    assert rounds.ratio("a", "b", "c") == 1.0, "the median of the rounds' ratios, not the ratio of medians"
    calls: list[str] = []
    timed = time_in_turn({name: lambda name=name: calls.append(name) for name in "xy"}, rounds=3, warmup=2)
    assert calls == list("xy" * 5) and [len(timed.seconds[name]) for name in "xy"] == [3, 3]


def test_the_floor_multiplies_as_much_as_the_fuser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched products of the same sizes: counted, not taken from the shapes."""
    model = tiny_c2c()
    open_gates(model)
    sizes: dict[str, list[tuple]] = {}
    products = fuser_products(model, 2 * 6)
    inputs = random_prompt(model, 7, 2)
    multiply, add = torch.bmm, torch.baddbmm

    def counted(name: str) -> None:
        seen = sizes.setdefault(name, [])
        monkeypatch.setattr(torch, "bmm", lambda x, w: seen.append((*x.shape, w.shape[2])) or multiply(x, w))
        monkeypatch.setattr(torch, "baddbmm", lambda b, x, w: seen.append((*x.shape, w.shape[2])) or add(b, x, w))

    counted("floor")
    products()
    counted("fused")
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)
    assert sizes["floor"] and sorted(sizes["floor"]) == sorted(sizes["fused"])


def test_parts_are_those_of_the_whole() -> None:
    model = tiny_c2c()
    open_gates(model)
    timed = benchmark_prefill(model, 8, 2, rounds=2)
    assert set(timed.seconds) == {"fused", "receiver", "sharers", "fuser"}
    assert all(second > 0 for seconds in timed.seconds.values() for second in seconds)
    timed = benchmark_training_step(model.train(), 8, 4, 2, rounds=1)
    assert set(timed.seconds) == {"step", "stored", "receiver", "sharers", "fuser", "answer"}
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing is left behind"
    memory = peak_memory(model.eval(), 8, 2)
    if memory is not None:
        peak, floor = memory
        assert peak > floor > sum(p.nbytes for p in model.fuser.parameters())


def test_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(
        benchmark_runs.PAIRS,
        "tiny",
        lambda dtype: [tiny_model("llama", 0).to(dtype), tiny_model("qwen3", 1).to(dtype)],
    )
    parts = [part for part in PARTS if part != "alignment"]
    results = list(run_benchmark("tiny", [8, 16], [1, 2], [8], parts, torch.bfloat16, rounds=2))
    assert [r["part"] for r in results] == [
        *("prefill", "decode", "prefill", "decode", "training"),
        *("prefill", "prefill", "training", "memory", "memory"),
    ]
    for result in results:
        assert result["dtype"] == "bfloat16" and result["part"] in result["line"]
        ratio = {"decode": "over_receiver", "memory": "over_reading"}.get(result["part"], "over_floor")
        assert result[ratio] > 0
    assert results[-1]["states_int8"] < results[-1]["states"]
    json.dumps(results)
    pytest.importorskip("matplotlib", reason="plots need the extra `[eval]`")
    plot_cost(results, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 5000


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"`pair` must be among .* but got \['other'\]"):
        next(run_benchmark("other", [8], [1], [8]))
    with pytest.raises(ValueError, match=r"`parts` must be among .* but got \['speed'\]"):
        next(run_benchmark("qwen", [8], [1], [8], ["speed"]))


def test_example_help() -> None:
    example = Path(__file__).parent.parent / "examples" / "benchmark.py"
    done = subprocess.run([sys.executable, str(example), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--lengths" in done.stdout
