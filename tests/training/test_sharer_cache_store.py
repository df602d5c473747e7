"""Sharers' caches kept on disk for training: they change no loss, outlive a run, and belong to one sharer."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from conftest import tiny_c2c
from safetensors.torch import load_file
from training_for_tests import (
    QUESTIONS,
    base_models,
    chat_rows,
    fuser_weights,
    logged_losses,
    make_model,
    make_processor,
    make_trainer,
    save_pair,
    write_rows,
)

from c2c_hf import C2CDataCollator, C2CForCausalLM
from c2c_hf.cli.main import main
from c2c_hf.inference.prefill import cached_states
from c2c_hf.inference.sharer_cache import SharerCache
from c2c_hf.training.collator import TrainingBatch
from c2c_hf.training.dataset import prepare_dataset
from c2c_hf.training.sharer_cache_store import SharerCacheStore


def batch(sharers: int = 1, rows: slice = slice(None)) -> dict[str, Any]:
    processor = make_processor(sharers=sharers)
    return C2CDataCollator(processor)(list(prepare_dataset(chat_rows(QUESTIONS), processor))[rows])


def load(store: SharerCacheStore, inputs: dict[str, Any]) -> list[SharerCache]:
    batch = TrainingBatch.from_inputs(inputs)
    return store.load(batch.sharer_input_ids, batch.sharer_attention_mask)


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the sharer was run")


def open_model(sharers: int = 1, **fields) -> C2CForCausalLM:
    model = make_model(sharers, fuser_initialization="zero_output", **fields)
    with torch.no_grad():
        for parameter in model.fuser.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model.eval()


@pytest.mark.parametrize("sharers", [1, 2])
def test_losses_are_those_of_sharers_that_run(tmp_path: Path, sharers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = open_model(sharers), batch(sharers)
    expected = model(**inputs).loss
    store = SharerCacheStore(tmp_path, model)
    # Prefilled in other batches, with longer and shorter rows.
    load(store, batch(sharers, slice(0, 3)))
    load(store, batch(sharers, slice(6, 8)))
    first = model(**inputs, sharer_caches=load(store, inputs)).loss
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(QUESTIONS) * sharers
    for sharer in model.sharers:
        monkeypatch.setattr(sharer, "forward", refuse)
        monkeypatch.setattr(sharer.base_model, "forward", refuse)
    second = model(**inputs, sharer_caches=load(SharerCacheStore(tmp_path, model), inputs)).loss
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    assert torch.equal(first, second)
    with pytest.raises(AssertionError, match="the sharer was run"):
        model(**inputs)


def test_eight_bits_are_near(tmp_path: Path) -> None:
    model, inputs = open_model(), batch()
    (exact,), (rounded,) = (load(SharerCacheStore(tmp_path, model, int8), inputs) for int8 in (False, True))
    assert len(list(tmp_path.iterdir())) == 2, "each precision has its own folder"
    for pair, other in zip(cached_states(exact.cache), cached_states(rounded.cache), strict=True):
        for states, near in zip(pair, other, strict=True):
            assert not torch.equal(states, near)
            torch.testing.assert_close(near, states, rtol=0, atol=float(states.abs().max()) / 200)


def test_training_is_the_same_and_goes_on_without_the_sharers(tmp_path: Path) -> None:
    """With choice of spans and guard loss, which roll texts from row to row; then by a pair without its sharer."""
    names = save_pair(tmp_path)
    sizes = {"fuser_hidden_size": 16, "fuser_intermediate_size": 24, "fuser_dropout": 0.0, "token_alignment": "span"}
    torch.manual_seed(7)
    model = C2CForCausalLM.from_receiver_and_sharers(*names, **sizes)
    model.save_pretrained(tmp_path / "fuser")
    fields = {"num_train_epochs": 2, "guard_weight": 0.5, "min_fused_fraction": 0.5, "learning_rate": 1e-2}
    fields |= {"per_device_train_batch_size": 4, "warmup_steps": 0}
    results = []
    for load_sharers, folder in ((True, None), (True, tmp_path / "states"), (False, tmp_path / "states")):
        model = C2CForCausalLM.from_pretrained(tmp_path / "fuser", load_sharers=load_sharers)
        trainer = make_trainer(tmp_path / "run", model, sharer_cache_dir=folder and str(folder), **fields)
        trainer.train()
        results.append((logged_losses(trainer), fuser_weights(trainer)))
    for found, weights in results[1:]:
        assert found == pytest.approx(results[0][0], abs=1e-4)
        for name, value in results[0][1].items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=2e-3, msg=name)
    assert len(set(results[0][0])) > 1


def test_command_line(tmp_path: Path) -> None:
    """One run fills the folder, the next continues its fuser without the sharer, whose weights are removed."""
    receiver, sharer = save_pair(tmp_path)
    shared: dict[str, Any] = {
        "train_data": [write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in QUESTIONS])],
        "sharer_cache_dir": str(tmp_path / "states"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "use_cpu": True,
    }
    first = {"receiver": receiver, "sharers": [sharer], "fuser_hidden_size": 8, "fuser_intermediate_size": 8}
    second = {"fuser": str(tmp_path / "first"), "load_sharers": False}
    for name, pair in (("first", first), ("second", second)):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump({**pair, **shared, "output_dir": str(tmp_path / name)}))
        assert main(["train", str(config)]) == 0
        assert len(list((tmp_path / "states").rglob("*.safetensors"))) == len(QUESTIONS)
        (Path(sharer) / "model.safetensors").unlink(missing_ok=True)
    trained = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert trained[0].keys() == trained[1].keys()
    assert any(not torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_a_missing_row_needs_its_sharer(tmp_path: Path) -> None:
    names = save_pair(tmp_path)
    C2CForCausalLM.from_receiver_and_sharers(*names, token_alignment="span", fuser_hidden_size=8).save_pretrained(
        tmp_path / "fuser"
    )
    model = C2CForCausalLM.from_pretrained(tmp_path / "fuser", load_sharers=False)
    with pytest.raises(ValueError, match="8 rows of this batch are not in .* their sharer was left out"):
        load(SharerCacheStore(tmp_path / "states", model), batch())


def test_another_sharer_is_prefilled_again(tmp_path: Path) -> None:
    store = SharerCacheStore(tmp_path, open_model())
    load(store, batch())
    receiver, sharer = base_models()
    with torch.no_grad():
        for parameter in sharer.parameters():
            parameter *= 1.5
    other = C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, token_alignment="span", fuser_hidden_size=8)
    before = set(tmp_path.rglob("*.safetensors"))
    load(SharerCacheStore(tmp_path, other), batch())
    assert len(set(tmp_path.rglob("*.safetensors")) - before) == len(QUESTIONS)


def test_damaged_files_and_fused_answers(tmp_path: Path) -> None:
    store = SharerCacheStore(tmp_path, open_model())
    load(store, batch())
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=f"{path.name}' is damaged .* delete it"):
        load(store, batch())
    path.unlink()
    load(store, batch())
    assert path.is_file() and not list(tmp_path.rglob("*.part"))
    with pytest.raises(ValueError, match="`sharer_cache_dir` must be None with `fuse_response=True`"):
        SharerCacheStore(tmp_path, tiny_c2c(fuse_response=True))
