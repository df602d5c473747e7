"""Evaluation by two processes: every item once, as by one process, also after one of them died."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from evaluation_for_tests import NEEDS, choice_rows, pair, write_rows
from processes_for_tests import die, die_after, needs_fork, run_processes

pytest.importorskip("lm_eval", reason=NEEDS)

from c2c_hf.evaluation.evaluate import evaluate
from c2c_hf.evaluation.run_records import RunFolder

PAIR = pair()
METHODS = ["receiver", "c2c", "mismatched"]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write_rows(tmp_path / "data" / "arc_easy" / "test.jsonl", choice_rows(7))
    passages = [
        {"context": f"The keeper counted {n} ships.", "question": "How many ships?", "answers": [str(n)]}
        for n in range(5)
    ]
    write_rows(tmp_path / "data" / "passages.jsonl", passages)
    return tmp_path / "data"


def run(
    data_dir: Path, output: Path, deaths: dict[int, int] | None = None, seconds: dict[int, float] | None = None
) -> None:
    """Evaluate; `deaths` maps the index of a process to the number of batches, `seconds` to the time, when it dies."""
    from accelerate import PartialState

    index = PartialState().process_index
    if seconds is not None and index in seconds:
        die_after(seconds[index])
    countdown = (deaths or {}).get(index)
    append, left = RunFolder.append, [countdown]

    def append_or_die(self: RunFolder, records: Any) -> None:
        append(self, records)
        if left[0] is not None:
            left[0] -= 1
            if left[0] <= 0:
                die()

    RunFolder.append = append_or_die
    try:
        metrics = evaluate(
            *PAIR,
            output,
            ["arc_easy", "reading"],
            METHODS,
            data_dir,
            data=[data_dir / "passages.jsonl"],
            batch_size=2,
            max_new_tokens=3,
        )
    finally:
        RunFolder.append = append
    assert {(row["task"], row["num_items"]) for row in metrics["results"]} == {("arc_easy", 7)}


def by_item(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {(record["task"], record["method"], record["id"]): record for record in records}
    assert len(found) == len(records), "an item is there twice"
    for record in records:
        record.pop("seconds")
    return found


def rounded(value: Any) -> Any:
    """Numbers of batches of other shapes differ in their last digits."""
    return pytest.approx(value, abs=2e-3) if isinstance(value, float | list) else value


def check(output: Path, single: Path, exact: bool) -> None:
    found, expected = by_item(output / "predictions.jsonl"), by_item(single / "predictions.jsonl")
    assert found.keys() == expected.keys() and len(found) == (7 + 5) * 3
    for key, record in expected.items():
        same = record if exact else {name: rounded(value) for name, value in record.items()}
        assert found[key] == same
    metrics, single_metrics = (json.loads((path / "metrics.json").read_text()) for path in (output, single))
    for row, single_row in zip(metrics["results"], single_metrics["results"], strict=True):
        assert (row["method"], row["value"], row["interval"]) == (
            single_row["method"],
            single_row["value"],
            single_row["interval"],
        )
    assert not list(output.glob("*.[0-9].jsonl")), "parts of single processes are left"


@needs_fork
def test_two_processes_equal_one(data_dir: Path, tmp_path: Path) -> None:
    run(data_dir, tmp_path / "single" / "run")
    assert run_processes(2, run, data_dir, tmp_path / "two" / "run") == [0, 0]
    check(tmp_path / "two" / "run", tmp_path / "single" / "run", exact=True)
    baselines = [(tmp_path / name / "reading_baselines.jsonl").read_text().splitlines() for name in ("single", "two")]
    assert len(baselines[0]) == len(baselines[1]) == len(set(baselines[1])) == 5
    # One of them dies; the next run has another number of processes.
    dead = run_processes(2, run, data_dir, tmp_path / "dead" / "run", {1: 3})
    assert -9 in dead
    part = tmp_path / "dead" / "run" / "predictions.1.jsonl"
    with part.open("a") as file:
        file.write('{"task": "arc_easy", "meth')
    run(data_dir, tmp_path / "dead" / "run")
    check(tmp_path / "dead" / "run", tmp_path / "single" / "run", exact=False)


@needs_fork
@pytest.mark.slow
def test_killed_at_twenty_moments(data_dir: Path, tmp_path: Path) -> None:
    run(data_dir, tmp_path / "single" / "run")
    start = time.monotonic()
    assert run_processes(2, run, data_dir, tmp_path / "two" / "run") == [0, 0]
    duration = time.monotonic() - start
    generator, num_killed = random.Random(0), 0
    for number in range(20):
        output = tmp_path / str(number) / "run"
        seconds = {generator.randrange(2): generator.uniform(0, duration)}
        codes = run_processes(2, run, data_dir, output, None, seconds)
        assert codes == [0, 0] or -9 in codes
        num_killed += codes != [0, 0]
        before = set()
        for path in output.glob("predictions*.jsonl"):
            # The last line may be half written.
            before |= {line for line in path.read_text().splitlines() if line.endswith("}")}
        assert run_processes(2, run, data_dir, output) == [0, 0]
        after = set((output / "predictions.jsonl").read_text().splitlines())
        assert before <= after, "an answered item is lost or answered again"
        check(output, tmp_path / "single" / "run", exact=False)
    assert num_killed >= 10
