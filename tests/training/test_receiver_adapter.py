"""A PEFT adapter on the receiver: trained with or without the fuser, saved beside it, loaded back."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file
from training_for_tests import base_models, fuser_weights, logged_losses, make_model, make_trainer

from c2c_hf import C2CForCausalLM
from c2c_hf.checkpoints.receiver_adapter import ADAPTER_FOLDER, has_adapter

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def with_lora(folder: Path, dropout: float = 0.0, **arguments):
    fields = {"max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 0, **arguments}
    return make_trainer(folder, peft_config=LoraConfig(**LORA, lora_dropout=dropout), **fields)


def logits(model: C2CForCausalLM, trainer) -> torch.Tensor:
    batch = trainer.data_collator(list(trainer.train_dataset)[:3])
    answers = batch.pop("labels")[:, -batch["logits_to_keep"] :] != -100
    with torch.no_grad():
        return model.eval()(**batch).logits[answers]


def reload(folder: Path) -> C2CForCausalLM:
    receiver, *sharers = base_models()
    return C2CForCausalLM.from_pretrained(folder, receiver=receiver, sharers=sharers)


@pytest.mark.parametrize("train_fuser", [True, False])
def test_only_the_adapter_and_the_fuser_change(tmp_path: Path, train_fuser: bool) -> None:
    trainer = with_lora(tmp_path, train_fuser=train_fuser)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        expected = ".lora_" in name or (train_fuser and name.startswith("fuser."))
        assert torch.equal(value, before[name]) != expected, name


def test_the_adapter_learns_from_the_fused_prompt(tmp_path: Path) -> None:
    """With the fuser, gradients reach the adapter through the states that the receiver fuses, too."""
    trainer = with_lora(tmp_path)
    model, batch = trainer.model.train(), trainer.data_collator(list(trainer.train_dataset)[:2])
    batch["labels"][:, :-2] = -100
    trainer.compute_loss(model, dict(batch)).backward()
    whole = {n: p.grad.clone() for n, p in model.receiver.named_parameters() if "lora_B" in n and "v_proj" in n}
    assert all(gradient.abs().max() > 0 for gradient in whole.values())
    has_gradient = []
    for layer in model.receiver.model.layers:
        layer.register_forward_hook(lambda module, args, output: has_gradient.append(output.requires_grad))
    trainer.compute_loss(model, dict(batch))
    assert has_gradient == [True] * 2 * len(model.receiver.model.layers), "in the fused region and behind it"


@pytest.mark.parametrize("train_fuser", [True, False])
def test_saved_beside_the_fuser(tmp_path: Path, train_fuser: bool) -> None:
    trainer = with_lora(tmp_path / "run", train_fuser=train_fuser)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    files = sorted(str(p.relative_to(tmp_path / "saved")) for p in (tmp_path / "saved").rglob("*") if p.is_file())
    adapter = [f"{ADAPTER_FOLDER}/adapter_config.json", f"{ADAPTER_FOLDER}/adapter_model.safetensors"]
    assert set(adapter) <= set(files)
    assert not any("lora" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    loaded = reload(tmp_path / "saved")
    # Fusion off and closed gates: the same receiver, in forward passes of other lengths.
    torch.testing.assert_close(logits(loaded, trainer), logits(trainer.model, trainer), rtol=0, atol=1e-4)
    assert (logits(loaded, trainer) - logits(make_model(), trainer)).abs().max() > 1e-2
    # Saved again from what was loaded, and without an adapter into the same folder.
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / adapter[1]) for name in ("saved", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    make_model().save_pretrained(tmp_path / "again")
    assert not has_adapter(reload(tmp_path / "again").receiver)


# Asked for by peft itself.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_what_was_saved(tmp_path: Path) -> None:
    trainer = with_lora(tmp_path / "run", train_fuser=False)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    expected = PeftModel.from_pretrained(base_models()[0], str(tmp_path / "saved" / ADAPTER_FOLDER))
    ids = torch.arange(5, 11).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(expected(ids).logits, trainer.model.receiver(ids).logits)
        assert not torch.allclose(expected(ids).logits, base_models()[0](ids).logits, atol=1e-3)


def test_resuming_is_exact(tmp_path: Path) -> None:
    whole = with_lora(tmp_path / "whole", max_steps=6, dropout=0.3)
    whole.train()
    part = with_lora(tmp_path / "part", max_steps=6, dropout=0.3, save_strategy="steps", save_steps=3)
    part.train()
    again = with_lora(tmp_path / "part", max_steps=6, dropout=0.3, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert logged_losses(again)[3:] == logged_losses(whole)[3:]
    for name, value in fuser_weights(whole).items():
        assert torch.equal(fuser_weights(again)[name], value), name


def test_lora_dropout_acts_only_in_training(tmp_path: Path) -> None:
    trainer = with_lora(tmp_path, dropout=0.5)
    trainer.train()
    dropouts = [m for n, m in trainer.model.receiver.named_modules() if n.endswith("lora_dropout.default")]
    trainer.model.train()
    assert dropouts and all(module.training for module in dropouts) and not trainer.model.receiver.training
    trainer.model.eval()
    assert not any(module.training for module in dropouts)


def test_invalid_adapters_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_fuser=False` leaves nothing to train"):
        make_trainer(tmp_path, train_fuser=False)
    with pytest.raises(ValueError, match="`peft_config` must be a PEFT configuration of an adapter inside"):
        make_trainer(tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=3))
    trainer = with_lora(tmp_path)
    with pytest.raises(ValueError, match="has an adapter already"):
        make_trainer(tmp_path, trainer.model, peft_config=LoraConfig(**LORA))
    trainer.model.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / ADAPTER_FOLDER / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(ValueError, match="does not fit the base model: 1 weights missing"):
        reload(tmp_path / "saved")
    weights.write_bytes(b"pickle")
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        reload(tmp_path / "saved")
    weights.unlink()
    with pytest.raises(ValueError, match="half of an adapter"):
        reload(tmp_path / "saved")
