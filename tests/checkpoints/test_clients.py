"""Base models and arguments as other libraries hand them over."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, enlarge_weights, random_ids, randomize_fuser, save_tiny_model, tiny_c2c, tiny_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tokenizers_for_tests import byte_level_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
)

from c2c_hf import C2CForCausalLM, C2CProcessor, SharerCache
from c2c_hf.inference.fingerprints import fingerprint

# PEFT's own call.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = random_ids(2, 9)
SIZES = {"token_alignment": "identity", "fuser_hidden_size": 16, "fuser_intermediate_size": 16}


def lora(model: PreTrainedModel, name: str = "default") -> PeftModel:
    """An adapter that changes the answers."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config, adapter_name=name)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


# ---------------------------------------------------------------------- PEFT


def test_peft_models_as_base_models(tmp_path: Path) -> None:
    """Their adapters are saved beside the fuser, and loaded into the base models that the names stand for."""
    receiver, sharer = lora(tiny_model("llama")), lora(tiny_model("qwen3", 1), "style")
    alone = logits(receiver)
    model = randomize_fuser(C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, **SIZES), 3)
    assert torch.equal(logits(model.receiver), alone)
    assert not any(parameter.requires_grad for parameter in (*receiver.parameters(), *sharer.parameters()))
    model.save_pretrained(tmp_path)
    assert {"receiver_adapter", "sharer_0_adapter"} < {path.name for path in tmp_path.iterdir()}

    loaded = C2CForCausalLM.from_pretrained(
        tmp_path, receiver=tiny_model("llama"), sharers=[tiny_model("qwen3", 1)], verify_base_models=True
    )
    assert torch.equal(logits(loaded), logits(model))
    plain = C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), tiny_model("qwen3", 1), **SIZES)
    plain.fuser.load_state_dict(model.fuser.state_dict())
    assert not torch.equal(logits(loaded), logits(plain))
    again = C2CForCausalLM.from_pretrained(tmp_path, receiver=lora(tiny_model("llama")), sharers=sharer)
    assert torch.equal(logits(again), logits(model)), "an adapter that is there already gets the saved weights"
    with pytest.raises(ValueError, match="`receiver`: this fuser was made for a model with weights' fingerprint"):
        C2CForCausalLM.from_pretrained(tmp_path, receiver=lora(tiny_model("llama", 9)), sharers=sharer)

    (tmp_path / "sharer_0_adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds half of an adapter in sharer_0_adapter"):
        C2CForCausalLM.from_pretrained(tmp_path, receiver=receiver, sharers=sharer)
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*adapter")), "those of an earlier save go"


def test_a_fingerprint_names_model_and_adapter() -> None:
    plain, adapted = tiny_model("llama"), lora(tiny_model("llama")).get_base_model()
    own, _, adapter = str(fingerprint(adapted)).partition("+")
    assert own == fingerprint(plain) and len(adapter) == 16
    model = C2CForCausalLM.from_receiver_and_sharers(tiny_model("qwen3"), lora(tiny_model("llama")), **SIZES)
    cache = SharerCache.prefill(plain, IDS)
    with pytest.raises(ValueError, match="`sharer_caches`: sharer 0 of this fuser has weights' fingerprint"):
        model(IDS, sharer_input_ids=IDS, sharer_caches=cache)


def test_adapters_that_cannot_be_used() -> None:
    prompt = get_peft_model(tiny_model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    several = lora(tiny_model("llama"))
    several.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    for model, message in (
        (prompt, "an adapter of type PROMPT_TUNING is not inside the layers"),
        (several, r"has several adapters, \['default', 'second'\]; keep one"),
        (torch.nn.Linear(2, 2), "must be a transformers model, a Hub id or a folder, but got Linear"),
    ):
        for pair, role in (((model, tiny_model("qwen3")), "receiver"), ((tiny_model("qwen3"), model), "sharers")):
            with pytest.raises((TypeError, ValueError), match=f"`{role}`.*{message}"):
                C2CForCausalLM.from_receiver_and_sharers(*pair)


def test_get_peft_model_adapts_the_receiver_alone(tmp_path: Path) -> None:
    model = tiny_c2c()
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all(".receiver." in name and "lora_" in name for name in trained)
    assert torch.equal(logits(adapted), before), "a new adapter changes nothing"
    optimizer = torch.optim.SGD((parameter for parameter in adapted.parameters() if parameter.requires_grad), 1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert not torch.allclose(logits(adapted), before)
    assert torch.equal(
        adapted.generate(input_ids=IDS, max_new_tokens=3, do_sample=False),
        model.generate(IDS, max_new_tokens=3, do_sample=False),
    )
    # Beside the fuser, and as PEFT saves it.
    model.save_pretrained(tmp_path / "fuser")
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = tiny_c2c()
    loaded = C2CForCausalLM.from_pretrained(tmp_path / "fuser", receiver=tiny_model("llama"), sharers=fresh.sharers)
    assert torch.equal(logits(loaded), logits(adapted))
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), logits(adapted))

    adapted_sharer = C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), lora(tiny_model("qwen3")), **SIZES)
    with pytest.raises(ValueError, match="`get_peft_model` changes the adapter that a sharer has"):
        get_peft_model(adapted_sharer, LoraConfig(r=2, target_modules=["q_proj"]))


# ---------------------------------------------------------------------- quantized base models


def quantization(name: str) -> dict[str, Any]:
    library = name.partition("-")[0]
    module = {"quanto": "optimum.quanto", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}[library]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        pytest.skip(f"needs {module} (extra `[quantized]`)")
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    elif library == "quanto":
        config = QuantoConfig(weights="int8")
    else:
        config = BitsAndBytesConfig(**{"load_in_8bit" if name.endswith("int8") else "load_in_4bit": True})
    return {"quantization_config": config, "dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two base models whose matrices are large enough for kernels."""
    places, tokenizer = [], byte_level_tokenizer()
    for index in range(2):
        torch.manual_seed(index)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2 + index}
        config = type(CONFIGS["llama"]).from_dict({**CONFIGS["llama"].to_dict(), **sizes, "head_dim": 16})
        config.vocab_size = len(tokenizer)
        places.append(tmp_path_factory.mktemp("base"))
        enlarge_weights(AutoModelForCausalLM.from_config(config)).save_pretrained(places[-1])
        tokenizer.save_pretrained(places[-1])
    return places


@pytest.mark.parametrize("name", ["quanto-int8", "torchao-int8", "bitsandbytes-int8", "bitsandbytes-4bit"])
def test_quantized_base_models(
    name: str, folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They answer as by themselves, and a fuser built on them loads them quantized again and says what it trusts."""
    kwargs = quantization(name)
    model = C2CForCausalLM.from_receiver_and_sharers(*folders, receiver_kwargs=kwargs, sharer_kwargs=kwargs, **SIZES)
    randomize_fuser(model, 3)
    alone = AutoModelForCausalLM.from_pretrained(folders[0], **kwargs)
    assert torch.equal(logits(model.receiver), logits(alone))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model.receiver), logits(alone)), "saving does not touch the weights"
    with caplog.at_level(logging.WARNING):
        loaded = C2CForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert caplog.text.count("were not compared with those that the fuser was trained with") == 2
    for found, expected in zip((loaded.receiver, *loaded.sharers), (model.receiver, *model.sharers), strict=True):
        kinds = [[type(one) for layer in each.model.layers for one in layer.modules()] for each in (found, expected)]
        assert kinds[0] == kinds[1]
        weights = [each.model.layers[0].self_attn.q_proj.weight for each in (found, expected)]
        assert type(weights[0]) is type(weights[1]) is not torch.nn.Parameter
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.generate(IDS, max_new_tokens=4), model.generate(IDS, max_new_tokens=4))


def test_a_quantized_receiver_for_a_fuser_of_plain_ones(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    C2CForCausalLM.from_receiver_and_sharers(*folders, **SIZES).save_pretrained(tmp_path)
    kwargs = quantization("quanto-int8")
    with caplog.at_level(logging.WARNING):
        loaded = C2CForCausalLM.from_pretrained(tmp_path, receiver_kwargs=kwargs)
    assert caplog.text.count("were not compared") == 1 and "because they are quantized" in caplog.text
    assert type(loaded.receiver.model.layers[0].self_attn.q_proj).__name__ == "QLinear"
    assert type(loaded.sharers[0].model.layers[0].self_attn.q_proj) is torch.nn.Linear


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    """Write a Llama model with its tokenizer as llama.cpp's converter does."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    ids = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.__getitem__))
    writer.add_token_types([1] * len(ids))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("options", [{}, {"quantization_config": GgufConfig(dequantize=True)}])
def test_gguf_files_are_recorded(options: dict[str, Any], tmp_path: Path) -> None:
    """Also where another model is in the same folder, which a reload without the file's name would take."""
    pytest.importorskip("gguf", reason="needs gguf (extra `[quantized]`)")
    tokenizer = byte_level_tokenizer()
    base = tmp_path / "base"
    save_tiny_model(base, "llama", tokenizer, seed=77)
    write_gguf(base / "tiny.gguf", tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    sharer = save_tiny_model(tmp_path / "sharer", "qwen3", tokenizer, seed=1)
    kwargs = {"gguf_file": "tiny.gguf", **options}
    for pair, role in (((base, sharer), "receiver_kwargs"), ((sharer, base), "sharer_kwargs")):
        model = C2CForCausalLM.from_receiver_and_sharers(*pair, fuser_hidden_size=16, **{role: kwargs})
        randomize_fuser(model, 3).save_pretrained(tmp_path / role)
        loaded = C2CForCausalLM.from_pretrained(tmp_path / role)
        assert torch.equal(logits(loaded), logits(model))
        recorded = [loaded.config.receiver_gguf_file, loaded.config.sharers[0].gguf_file]
        assert recorded == (["tiny.gguf", None] if role == "receiver_kwargs" else [None, "tiny.gguf"])
        assert None not in (loaded.config.receiver_fingerprint, loaded.config.sharers[0].fingerprint)
        processor = C2CProcessor.from_config(loaded.config)
        assert processor.token_alignments == ["identity"]


# ---------------------------------------------------------------------- arguments


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
