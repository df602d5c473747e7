"""The benchmark times what it says: the same work, and every part of the floor; the scripts that compare checkouts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import tiny_c2c, tiny_model

from c2c_hf.benchmarks import suite
from c2c_hf.benchmarks.cases import (
    benchmark_prefill,
    benchmark_training_step,
    fuser_products,
    open_gates,
    prefill_memory,
    random_prompt,
)
from c2c_hf.benchmarks.gpu import TINY_PAIRS, gpu_table, run_gpu_benchmark
from c2c_hf.benchmarks.suite import PARTS, plot_cost, run_benchmark
from c2c_hf.benchmarks.timing import Rounds, time_in_turn

ROOT = Path(__file__).parents[2]


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
    memory = prefill_memory(model.eval(), 8, 2)
    if memory is not None:
        peak, floor = memory
        assert peak > floor > sum(p.nbytes for p in model.fuser.parameters())


def test_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(
        suite.PAIRS,
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
        ratio = {"decode": "over_receiver", "memory": "warm_over_prompt"}.get(result["part"], "over_floor")
        assert result[ratio] > 0
    assert results[-1]["message_int8"] < results[-1]["message"]
    json.dumps(results)
    pytest.importorskip("matplotlib", reason="plots need the extra `[eval]`")
    plot_cost(results, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 5000


def test_refused() -> None:
    with pytest.raises(ValueError, match="`pair` must be one of .* but got 'other'"):
        next(run_benchmark("other", [8], [1], [8]))
    with pytest.raises(ValueError, match="`parts` must be one of .* but got 'speed'"):
        next(run_benchmark("qwen", [8], [1], [8], ["speed"]))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_help(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        example("benchmark").main()
    assert "--lengths" in capsys.readouterr().out


def test_calls_are_counted_as_documented(tmp_path: Path) -> None:
    """Repeated calls, a generator, a call through foreign code; what comes behind the end does not count."""
    (tmp_path / "first.py").write_text(
        "import second\n"
        "def start(foreign):\n"
        "    second.work()\n"
        "    second.work()\n"
        "    foreign(second.work)\n"
        "    return list(second.numbers())\n"
    )
    (tmp_path / "second.py").write_text(
        "def work():\n    return [helper(i) for i in range(2)]\n"
        "def helper(i):\n    return i\n"
        "def numbers():\n    yield helper(1)\n    yield helper(2)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        import first

        def run(count) -> int:
            assert first.start(lambda function: function()) == [1, 2]
            reached = count()
            first.start(lambda function: function())
            return reached

        calls = example("trace_prompt").record_calls(tmp_path, run)
    finally:
        sys.path.remove(str(tmp_path))
    own = [call for call in calls if "<" not in call.callee[1]]
    changes = [call for call in own if call.caller[0] not in ("", call.callee[0])]
    assert [call.callee for call in changes] == [("second.py", "work")] * 3 + [("second.py", "numbers")]
    assert own[0].caller == ("", "") and own[0].callee == ("first.py", "start")
    assert [call.callee[1] for call in own].count("helper") == 8


@pytest.mark.parametrize("mode", ["fusion", "memory"])
def test_the_way_of_a_prompt(mode: str) -> None:
    calls = example("trace_prompt").trace(mode)
    files = [call.callee[0].replace("\\", "/") for call in calls]
    fuser = {"fusion": "fusers/c2c.py", "memory": "fusers/memory.py"}[mode]
    assert files[0] == "modeling_c2c.py" and calls[0].callee[1] == "generate"
    assert {"inference/prefill.py", fuser} <= set(files)


def test_checkouts_are_compared(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "compare_checkouts.py"), str(ROOT), str(ROOT)]
    command += ["--pair", "tiny", "--lengths", "8", "--dtypes", "float32", "--hidden-size", "8", "--rounds", "2"]
    done = subprocess.run([*command, "--limit", "1000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["fusion float32 8", "memory float32 8"]
    assert all("before" in line and "after" in line and "ratio" in line for line in lines)
    command[2] = str(tmp_path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "is no checkout" in done.stderr


def test_the_table_of_a_gpu(tmp_path: Path) -> None:
    """On the CPU, in tiny shapes: every figure but those of CUDA."""
    results = list(
        run_gpu_benchmark(
            TINY_PAIRS, (12,), (1, 2), 8, torch.float32, "cpu", rounds=1, seconds=1000, compile_fuser=False
        )
    )
    assert [row["batch_size"] for row in results] == [1, 2] and not any("missing" in row for row in results)
    assert results[0]["fusion_graph_failure"] == "no CUDA device" and results[0]["synchronizations"] is None
    late = list(run_gpu_benchmark(TINY_PAIRS, (12,), (1,), 8, torch.float32, "cpu", seconds=0))
    assert late[0]["missing"] == "out of time"
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), encoding="utf-8")
    for _ in range(2):
        example("benchmark_gpu").write_table(page, gpu_table([*results, *late]), "Title:")
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| tiny-a, tiny-b |")]
    assert len(rows) == 3 and "out of time" in rows[2] and "No GPU was available to fill it." not in lines
    heading = next(line for line in lines if line.startswith("| receiver, sharer |"))
    assert {line.count(" | ") for line in rows} == {heading.count(" | ")}


def test_growth(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    growth = example("benchmark_growth")
    threads = torch.get_num_threads()
    monkeypatch.setattr(growth, "SHARERS_AT", 32)
    command = ["growth", "--lengths", "32", "64", "--sharers", "1", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "growth.json")])
    try:
        growth.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("fusion", "memory slots", "token table", "span alignment", "exponent"))
    assert set(json.loads((tmp_path / "growth.json").read_text())) == {"rounds", "length", "sharers at 32 tokens"}
    assert growth.exponent({2: 4.0, 4: 8.0, 8: 16.0}) == pytest.approx((1.0, 0.0))
