"""Training outside `C2CTrainer` with accelerate, and its own log in tensorboard."""

from pathlib import Path

import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from training_for_tests import QUESTIONS, chat_rows, make_model, make_processor, make_trainer

from c2c_hf import C2CDataCollator, C2CForCausalLM
from c2c_hf.training.dataset import prepare_dataset


def test_a_loop_of_accelerate(tmp_path: Path) -> None:
    """The fuser alone learns, and is saved by the accelerator."""
    model, processor, accelerator = (
        make_model(fuser_initialization="zero_output"),
        make_processor(),
        Accelerator(cpu=True),
    )
    examples = prepare_dataset(chat_rows(QUESTIONS), processor)
    loader = DataLoader(examples, batch_size=4, collate_fn=C2CDataCollator(processor))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    frozen = {name: value.clone() for name, value in model.receiver.named_parameters()}
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
    assert losses[-2] < losses[0] and losses[-1] < losses[1]
    assert all(torch.equal(value, frozen[name]) for name, value in model.receiver.named_parameters())
    whole = accelerator.get_state_dict(prepared)
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path, state_dict=whole, save_function=accelerator.save)
    loaded = C2CForCausalLM.from_pretrained(tmp_path, receiver=model.receiver, sharers=model.sharers)
    assert all(map(torch.equal, loaded.fuser.state_dict().values(), model.fuser.state_dict().values()))


def test_tensorboard(tmp_path: Path, monkeypatch) -> None:
    """The loss beside the fuser's own curves."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    make_trainer(tmp_path / "run", max_steps=2, report_to="tensorboard").train()
    (folder,) = {path.parent for path in (tmp_path / "curves").rglob("*tfevents*")}
    curves = EventAccumulator(str(folder)).Reload()
    names = ("loss", "gates_open_key", "gates_open_value", "gate_temperature", "tokens_per_second")
    for name in names:
        assert [event.step for event in curves.Scalars(f"train/{name}")] == [1, 2], name
