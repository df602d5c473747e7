"""What the trackers that `report_to` names have after a run: the fuser's own curves beside the loss."""

from pathlib import Path

import pytest
from training_for_tests import make_trainer

CURVES = ("loss", "gates_open_key", "gates_open_value", "gate_temperature", "mean_weight", "tokens_per_second")


def train(folder: Path, tracker: str) -> dict[str, list[float]]:
    """Train three steps and return the logged curves."""
    trainer = make_trainer(folder, max_steps=3, report_to=tracker, run_name="tiny", project="fusers")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {f"train/{name}": [entry[name] for entry in logs] for name in CURVES}


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs `pip install c2c_hf[train]`"
    )
    expected = train(tmp_path / "run", "tensorboard")
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(file)).Reload()
    for name, values in expected.items():
        assert [event.value for event in found.Scalars(name)] == pytest.approx(values, rel=1e-5), name


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage", reason="needs `pip install trackio`")
    expected = train(tmp_path / "run", "trackio")
    found = storage.SQLiteStorage.get_logs("fusers", "tiny")
    for name, values in expected.items():
        assert [entry[name] for entry in found if name in entry] == pytest.approx(values), name


@pytest.mark.slow
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs `pip install wandb`")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    expected = train(tmp_path / "run", "wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/global_step"] == 3
    for name, values in expected.items():
        assert summary[name] == pytest.approx(values[-1]), name
