"""What `PreTrainedModel` promises of every model holds for a C2C model, or is refused in one sentence."""

from pathlib import Path

import pytest
import torch
from conftest import random_ids, tiny_c2c, tiny_model
from torch import nn
from transformers import PreTrainedModel

from c2c_hf import C2CForCausalLM
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.checkpoints import base_models

IDS = random_ids(1, 9)


@pytest.mark.parametrize("fusion", [True, False], ids=["fusion", "receiver alone"])
@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
@torch.no_grad()
def test_outputs_asked_for_in_the_configuration(name: str, fusion: bool) -> None:
    model = tiny_c2c()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": IDS} if fusion else {"input_ids": IDS[:, :1]}
    assert model(**inputs).get(name) is None
    expected = model(**inputs, **{f"output_{name}": True}).get(name)
    setattr(model.config, f"output_{name}", True)
    found = model(**inputs).get(name)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))
    assert model(**inputs, **{f"output_{name}": False}).get(name) is None


@pytest.mark.parametrize("length", [9, 1], ids=["fusion", "receiver alone"])
@torch.no_grad()
def test_use_cache_of_the_configuration(length: int) -> None:
    """The model's own comes before the receiver's; an argument before both."""
    model, ids = tiny_c2c(), IDS[:, :length]
    model.receiver.config.use_cache = False
    assert model(input_ids=ids).get(CACHE_ARGUMENT) is None
    model.config.use_cache = True
    assert model(input_ids=ids)[CACHE_ARGUMENT].get_seq_length() == length
    model.config.use_cache = False
    assert model(input_ids=ids).get(CACHE_ARGUMENT) is None
    assert model(input_ids=ids, use_cache=True)[CACHE_ARGUMENT].get_seq_length() == length


@torch.no_grad()
def test_resized_vocabulary() -> None:
    """New tokens of the receiver; with equal ids of the sharer, too; in a lookup table they have no counterpart."""
    model = tiny_c2c()
    before = model(input_ids=IDS).logits
    embeddings = model.resize_token_embeddings(120, mean_resizing=False)
    assert embeddings is model.get_input_embeddings() and embeddings.weight.shape[0] == 120
    logits = model(input_ids=IDS).logits
    assert logits.shape[-1] == 120 and torch.equal(logits[..., :96], before)
    assert model(input_ids=torch.full((1, 4), 119)).logits.isfinite().all()
    assert not any(
        parameter.requires_grad for parameter in (*model.receiver.parameters(), *model.sharers.parameters())
    )
    assert model.config.receiver_config.vocab_size == model.config.sharers[0].config.vocab_size == 120

    model = C2CForCausalLM._from_config(tiny_c2c(token_alignment="span").config)
    assert model.resize_token_embeddings(100, mean_resizing=False).weight.shape[0] == 100
    assert model.sharers[0].get_input_embeddings().weight.shape[0] == 96


@torch.no_grad()
def test_tables_of_a_resized_vocabulary() -> None:
    config = tiny_c2c().config
    config.sharers[0].token_alignment = "first"
    model = C2CForCausalLM._from_config(config).eval()
    model.token_table_0.copy_(torch.arange(96))
    model.resize_token_embeddings(100, mean_resizing=False)
    assert model.token_table_0.tolist() == [*range(96), -1, -1, -1, -1]
    assert model(input_ids=torch.tensor([[5, 99, 7, 8]])).logits.shape[-1] == 100
    model.set_input_embeddings(nn.Embedding(50, model.receiver.config.hidden_size))
    assert model.token_table_0.tolist() == [*range(50)]


@torch.no_grad()
def test_set_embeddings() -> None:
    model = tiny_c2c()
    value = nn.Embedding(96, model.receiver.config.hidden_size)
    model.set_input_embeddings(value)
    assert model.get_input_embeddings() is model.receiver.get_input_embeddings() is value
    head = nn.Linear(model.receiver.config.hidden_size, 96, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is model.receiver.get_output_embeddings() is head


def test_from_config() -> None:
    """Attention and precision reach the base models; the configuration stays as it was."""
    model = tiny_c2c()
    built = C2CForCausalLM._from_config(model.config, attn_implementation="eager", dtype=torch.bfloat16)
    for base in (built.receiver, *built.sharers):
        assert (base.config._attn_implementation, base.dtype) == ("eager", torch.bfloat16)
    assert model.receiver.config._attn_implementation == "sdpa"
    assert C2CForCausalLM._from_config(model.config).receiver.dtype == torch.float32


@pytest.fixture
def saved(tmp_path: Path) -> tuple[C2CForCausalLM, Path]:
    model = tiny_c2c()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_loading_arguments(saved: tuple[C2CForCausalLM, Path]) -> None:
    model, folder = saved
    bases = {"receiver": model.receiver, "sharers": list(model.sharers)}
    loaded, info = C2CForCausalLM.from_pretrained(folder, **bases, output_loading_info=True, low_cpu_mem_usage=True)
    assert isinstance(loaded, C2CForCausalLM) and not any(info.values())
    assert {*info} == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    weights = {name: value + 1 for name, value in model.state_dict().items() if value.is_floating_point()}
    given = C2CForCausalLM.from_pretrained(folder, **bases, state_dict=weights, use_safetensors=True)
    for name, parameter in given.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name) + name.startswith("fuser."))
    with pytest.raises(ValueError, match="`use_safetensors` must be True or None"):
        C2CForCausalLM.from_pretrained(folder, **bases, use_safetensors=False)
    with pytest.raises(ValueError, match="`gguf_file` names a file of one base model; pass it in `receiver_kwargs`"):
        C2CForCausalLM.from_pretrained(folder, **bases, gguf_file="model.gguf")
    with pytest.raises(ValueError, match="more than the saved weights hold"):
        C2CForCausalLM.from_pretrained(folder, **bases, state_dict={})


def test_loading_arguments_of_base_models(
    saved: tuple[C2CForCausalLM, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each base model gets them, its own arguments first."""
    model, folder = saved
    paths = [str(tmp_path / name) for name in ("receiver", "sharer")]
    for base, path in zip((model.receiver, *model.sharers), paths, strict=True):
        base.save_pretrained(path)
    calls = []
    original = base_models.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: str, **kwargs: object) -> PreTrainedModel:
        calls.append(kwargs)
        return original(name)

    monkeypatch.setattr(base_models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    C2CForCausalLM.from_pretrained(
        folder,
        receiver=paths[0],
        sharers=paths[1],
        quantization_config={"load": 4},
        max_memory={0: "1GB"},
        tqdm_class=int,
        use_safetensors=True,
        sharer_kwargs={"quantization_config": None},
    )
    expected = {"max_memory": {0: "1GB"}, "tqdm_class": int, "use_safetensors": True, "trust_remote_code": False}
    assert calls == [{**expected, "quantization_config": value} for value in ({"load": 4}, None)]


def test_c2c_models_in_place_of_plain_ones() -> None:
    model = tiny_c2c()
    for role, bases in {"receiver": (model, tiny_model("llama")), "sharers": (tiny_model("llama"), model)}.items():
        with pytest.raises(
            ValueError, match=f"`{role}` must be a plain .* but got a C2C model; hand over its receiver"
        ):
            C2CForCausalLM.from_receiver_and_sharers(*bases)
    assistant = tiny_c2c(token_alignment="span")
    for main in (model, tiny_model("llama")):
        with pytest.raises(ValueError, match="As `assistant_model`, which gets none, pass the receiver alone"):
            main.generate(IDS, assistant_model=assistant, max_new_tokens=3)
        expected = main.generate(IDS, max_new_tokens=5, do_sample=False)
        answer = main.generate(IDS, assistant_model=assistant.receiver, max_new_tokens=5, do_sample=False)
        assert torch.equal(answer, expected)
