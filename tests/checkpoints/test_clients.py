"""Base models and arguments as other libraries hand them over."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_c2c, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from c2c_hf import C2CForCausalLM


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_models_are_refused_by_name() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for pair, role in (((model, tiny_model("qwen3")), "receiver"), ((tiny_model("qwen3"), model), "sharers")):
        with pytest.raises(
            TypeError, match=f"`{role}` must be a transformers model, but got PEFT's .*merge_and_unload"
        ):
            C2CForCausalLM.from_receiver_and_sharers(*pair)


def test_arguments_of_base_models_say_where_they_go(tmp_path: Path) -> None:
    model = tiny_c2c()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="arguments of a base model go into `receiver_kwargs` or `sharer_kwargs`"):
        C2CForCausalLM.from_pretrained(tmp_path, load_in_4bit=True)


def test_the_auto_class_hands_over_models(tmp_path: Path) -> None:
    model = tiny_c2c()
    model.save_pretrained(tmp_path)
    for sharers in (model.sharers, list(model.sharers), model.sharers[0]):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, receiver=model.receiver, sharers=sharers)
        assert loaded.sharers[0] is model.sharers[0]


def test_saving_and_loading_never_ask_base_models_for_their_weights(tmp_path: Path, monkeypatch) -> None:
    """Quantized ones may change their weights when they are asked."""
    model = tiny_c2c(token_alignment="identity")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the state dict of a base model was asked for")

    for base in (model.receiver, *model.sharers):
        monkeypatch.setattr(base, "state_dict", refuse)
    model.save_pretrained(tmp_path)
    loaded = C2CForCausalLM.from_pretrained(tmp_path, receiver=model.receiver, sharers=list(model.sharers))
    assert all(map(torch.equal, loaded.fuser.state_dict().values(), model.fuser.state_dict().values()))
