"""Checkpoints: exact resuming, killed runs, several processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_for_tests import PROCESSOR, base_models, fuser_weights, logged_losses, make_model, make_trainer
from training_worker_for_tests import distributed_trainer
from transformers.trainer_utils import get_last_checkpoint

from c2c_hf import C2CForCausalLM, C2CTrainer
from c2c_hf._compat import CACHE_ARGUMENT


def test_resuming_is_exact(tmp_path: Path) -> None:
    """Dropout, gate noise, spans, guard and shuffling all draw random numbers; epochs end between the steps."""
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "min_fused_fraction": 0.3,
        "guard_weight": 0.5,
        "mismatched_rate": 0.4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
    }
    straight = make_trainer(tmp_path / "straight", **options)
    straight.train()
    torch.manual_seed(123)
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert logged_losses(resumed) == logged_losses(straight)
    assert len(logged_losses(resumed)) == 6
    assert any(entry.get("guard_loss", 0) > 0 for entry in straight.state.log_history)
    expected = fuser_weights(straight)
    for name, value in fuser_weights(resumed).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_streams_resume_at_their_place(accumulation: int, tmp_path: Path) -> None:
    """In any epoch of the stream, three batches long, and not at all where the run is over."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 3}
    options |= {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-2}

    def train(folder: Path, checkpoint: Path | None = None) -> C2CTrainer:
        trainer = make_trainer(folder, **options)
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset().shuffle(seed=0, buffer_size=3)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer

    straight = train(tmp_path / "straight")
    for step in (3, 7, 8):
        resumed = train(tmp_path / "resumed", tmp_path / "straight" / f"checkpoint-{step}")
        assert resumed.state.global_step == 8
        assert logged_losses(resumed) == logged_losses(straight)
        assert all(torch.equal(value, fuser_weights(straight)[name]) for name, value in fuser_weights(resumed).items())


def test_checkpoints_hold_only_the_fuser(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=1e-2,
    )
    trainer.train()
    trainer.save_model()
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) == {f"fuser.{name}" for name in trainer.model.fuser.state_dict()}
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text())
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    for name, value in load_file(best / "model.safetensors").items():
        assert torch.equal(value, weights[name]), "the best model is loaded at the end"
    assert not list(tmp_path.glob(".saving-*"))
    receiver, *sharers = base_models()
    loaded = C2CForCausalLM.from_pretrained(best, receiver=receiver, sharers=sharers)
    for name, value in loaded.fuser.state_dict().items():
        assert torch.equal(value, weights[f"fuser.{name}"])
    assert type(PROCESSOR).from_pretrained(best).token_alignments == ["span"]


def test_checkpoints_of_another_fuser_are_rejected(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    other = make_trainer(tmp_path, make_model(fuser_hidden_size=8), max_steps=2)
    with pytest.raises(ValueError, match="does not fit"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def run_worker(*words: str, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    )
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    command = [sys.executable, *launcher, str(tests / "training_worker_for_tests.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The same global batches, fuser and losses; not every process aligns the second sharer in every step.

    Also with accumulated batches of which the last is smaller, or empty on one process; in evaluations; and continuing
    a checkpoint of another number of processes.
    """
    run_worker("distributed", str(tmp_path / "one"), "4")
    # Before 5.24 transformers loads the optimizer of several processes onto "cpu:0", which torch does not know.
    checkpoint = [str(tmp_path / "one" / "checkpoint-2")] if CACHE_ARGUMENT == "cache" else []
    run_worker("distributed", str(tmp_path / "two"), "2", *checkpoint, processes=2)
    one, two = (json.loads((tmp_path / name / "found.json").read_text()) for name in ("one", "two"))
    assert len(one["losses"]) == 5 and max(one["losses"]) - min(one["losses"]) > 1e-3
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    weights, expected = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("two", "one"))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=0)
    assert (tmp_path / "two" / "checkpoint-4" / "rng_state_1.pth").is_file()

    assert len(one["uneven"]) == 4
    assert two["uneven"] == pytest.approx(one["uneven"], rel=1e-4)
    assert two["uneven"][0] == pytest.approx(one["uneven"][0], rel=1e-6)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert sorted(two["writes"]) == sorted(one["writes"]), "each row's sharer cache has one writer"
    assert len(set(one["writes"])) == len(one["writes"]) == 8

    if checkpoint:
        assert two["resumed"] == pytest.approx(one["losses"], abs=1e-4)
    trainer = distributed_trainer(tmp_path / "resumed", 4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"))
    assert logged_losses(trainer) == pytest.approx(one["losses"], abs=1e-4)


def test_a_run_killed_while_it_saves_resumes(tmp_path: Path) -> None:
    killed = run_worker("killed", str(tmp_path), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert list(tmp_path.glob(".saving-*/checkpoint-4/model.safetensors")), "it was half written"
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint="auto")
    straight = make_trainer(tmp_path / "straight", **options)
    straight.train(resume_from_checkpoint="auto")
    assert logged_losses(resumed) == logged_losses(straight)
    expected = fuser_weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in fuser_weights(resumed).items())
    assert not list(tmp_path.glob(".saving-*"))
