"""Training by two processes: streamed data continue at their place, and a process may be killed at any moment."""

import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from accelerate.utils import gather_object
from processes_for_tests import die_after, needs_fork, run_processes
from training_for_tests import QUESTIONS, chat_rows, logged_losses, make_model, make_trainer

from c2c_hf import C2CTrainer
from c2c_hf._compat import CACHE_ARGUMENT

KILLS, STEPS = 20, 12

pytestmark = [
    needs_fork,
    pytest.mark.skipif(
        CACHE_ARGUMENT != "cache",
        reason="before 5.24 transformers loads the optimizers of several processes onto 'cpu:0', which torch rejects",
    ),
]


def train(folder: Path, make: Callable[[Path], C2CTrainer], dies: Mapping[int, float] = MappingProxyType({})) -> None:
    """Train, or resume; `dies` maps the index of a process to the seconds after which it is killed.

    Writes each step's loss and the ids of each step's rows, all processes' together.
    """
    trainer = make(folder)
    steps: list[tuple[int, list[list[int]]]] = []
    compute_loss = trainer.compute_loss

    def record(model: object, inputs: dict, *args: object, **kwargs: object) -> object:
        ids = inputs["input_ids"]
        steps.append((trainer.state.global_step, [row[row != 0].tolist() for row in ids]))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    if trainer.args.process_index in dies:
        die_after(dies[trainer.args.process_index])
    start = time.monotonic()
    trainer.train(resume_from_checkpoint="auto")
    rows = gather_object(steps)
    if trainer.is_world_process_zero():
        found = {"seconds": time.monotonic() - start, "rows": rows, "losses": logged_losses(trainer)}
        found["steps"] = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "found.json").write_text(json.dumps(found))


def found_in(folder: Path) -> dict:
    found = json.loads((folder / "found.json").read_text())
    rows: dict[int, list] = {}
    for step, ids in found["rows"]:
        rows.setdefault(step, []).extend(ids)
    return {**found, "rows": {step: sorted(ids) for step, ids in rows.items()}}


def make_plain(folder: Path) -> C2CTrainer:
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    return make_trainer(folder, make_model(), learning_rate=1e-2, **options)


def make_streaming(folder: Path, dispatches: bool) -> C2CTrainer:
    """Two files, or as many parts as processes; raw rows, tokenized as they come, in several epochs."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    if not dispatches:
        options["accelerator_config"] = {"dispatch_batches": False}
    trainer = make_trainer(folder, make_model(), **options)
    streamed = chat_rows(QUESTIONS).to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=3)
    return C2CTrainer(trainer.model, trainer.args, None, streamed, processing_class=trainer.processing_class)


def make_dispatching(folder: Path) -> C2CTrainer:
    return make_streaming(folder, dispatches=True)


def make_sharded(folder: Path) -> C2CTrainer:
    return make_streaming(folder, dispatches=False)


@pytest.mark.parametrize("make", [make_sharded, pytest.param(make_dispatching, marks=pytest.mark.slow)])
def test_streams_resume_at_their_place(make: Callable[[Path], C2CTrainer], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_processes(2, train, folder, make) == [0, 0]
    expected = found_in(folder)
    assert expected["steps"] == [*range(1, 7)]
    epoch = [row for step in (0, 1) for row in expected["rows"][step]]
    assert len({*map(tuple, epoch)}) == len(QUESTIONS), "two steps of two processes' two rows are all rows, once each"
    assert expected["rows"][0] != expected["rows"][2]
    # As a run that was stopped before its last checkpoint.
    (folder / "checkpoint-6").rename(tmp_path / "checkpoint-6")
    assert run_processes(2, train, folder, make) == [0, 0]
    resumed = found_in(folder)
    assert resumed["rows"] == {step: rows for step, rows in expected["rows"].items() if step >= 3}
    assert resumed["losses"] == pytest.approx(expected["losses"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    """Each run ends with the steps, the rows and the losses of the one that nobody killed."""
    assert run_processes(2, train, tmp_path / "whole", make_plain) == [0, 0]
    expected = found_in(tmp_path / "whole")
    generator, num_killed = random.Random(0), 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        dies = {generator.randrange(2): generator.uniform(0, expected["seconds"])}
        codes = run_processes(2, train, folder, make_plain, dies)
        num_killed += codes != [0, 0]
        assert codes == [0, 0] or -9 in codes
        if codes != [0, 0]:
            assert run_processes(2, train, folder, make_plain) == [0, 0]
        found = found_in(folder)
        assert found["steps"] == expected["steps"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert all(rows == expected["rows"][step] for step, rows in found["rows"].items())
        assert not list(folder.glob(".saving-*"))
    assert num_killed > KILLS // 2
