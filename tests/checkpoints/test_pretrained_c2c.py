"""Building, saving and loading: the fuser alone is saved, and only the base models that it was made for load again."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from conftest import CONFIGS, random_ids, randomize_fuser, tiny_c2c, tiny_model
from naive import naive_greedy, naive_prefill, own_positions
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    JambaConfig,
    MambaConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5

import c2c_hf
from c2c_hf import C2CConfig, C2CForCausalLM, C2CProcessor
from c2c_hf.checkpoints.base_models import fingerprint
from c2c_hf.configuration_c2c import SharerConfig


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Saved base models, a receiver and a sharer."""
    paths = tmp_path / "receiver", tmp_path / "sharer"
    for seed, (name, path) in enumerate(zip(("llama", "gemma3"), paths, strict=True)):
        tiny_model(name, seed).save_pretrained(path)
    return paths


@pytest.fixture
def saved(folders: tuple[Path, Path], tmp_path: Path) -> tuple[C2CForCausalLM, Path]:
    model = C2CForCausalLM.from_receiver_and_sharers(
        *folders, token_alignment="identity", fuser_hidden_size=12, fuser_intermediate_size=12
    )
    with torch.no_grad():
        for parameter in model.fuser.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "fuser")
    return model, tmp_path / "fuser"


def test_the_folder_holds_the_fuser_alone(saved: tuple[C2CForCausalLM, Path]) -> None:
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {name for name in model.state_dict() if name.startswith("fuser.")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= names


def test_weights_handed_to_saving(saved: tuple[C2CForCausalLM, Path], tmp_path: Path) -> None:
    """As trainers do: a whole model's weights come in, those of the fuser are written; by the main process alone."""
    model, folder = saved
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "doubled", state_dict=doubled)
    written, before = load_file(tmp_path / "doubled/model.safetensors"), load_file(folder / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(value, 2 * before[name]) for name, value in written.items())
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_loading_brings_the_base_models(saved: tuple[C2CForCausalLM, Path]) -> None:
    model, folder = saved
    ids = random_ids(2, 9)
    expected = model(input_ids=ids).logits
    loaded = C2CForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert not loaded.training
    handed_over = C2CForCausalLM.from_pretrained(folder, receiver=model.receiver, sharers=list(model.sharers))
    assert handed_over.receiver is model.receiver
    assert torch.equal(handed_over(input_ids=ids).logits, expected)
    auto = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(auto, C2CForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(folder), C2CConfig)


def test_a_new_process_computes_the_same(saved: tuple[C2CForCausalLM, Path], tmp_path: Path) -> None:
    model, folder = saved
    ids = random_ids(2, 9)
    safetensors.torch.save_file({"ids": ids, "logits": model(input_ids=ids).logits.detach()}, tmp_path / "expected")
    code = (
        "import sys, torch, safetensors.torch, c2c_hf\n"
        "from transformers import AutoModelForCausalLM\n"
        "expected = safetensors.torch.load_file(sys.argv[2])\n"
        "logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(input_ids=expected['ids']).logits\n"
        "assert torch.equal(logits, expected['logits'])\n"
        "print('equal')\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "expected")]
    environment = {**os.environ, "PYTHONPATH": str(Path(c2c_hf.__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


def test_shards(saved: tuple[C2CForCausalLM, Path]) -> None:
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="4KB")
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" not in names, "the file of the save before would win over the shards"
    assert "model.safetensors.index.json" in names
    ids = random_ids(1, 6)
    assert torch.equal(C2CForCausalLM.from_pretrained(folder)(input_ids=ids).logits, model(input_ids=ids).logits)
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_token_tables_travel_with_the_fuser(tmp_path: Path) -> None:
    tokenizers = byte_level_tokenizer(), metaspace_tokenizer()
    for name, path, tokenizer in zip(("llama", "qwen3"), ("receiver", "sharer"), tokenizers, strict=True):
        config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), "vocab_size": len(tokenizer) + 5})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / path)
        tokenizer.save_pretrained(tmp_path / path)
    model = C2CForCausalLM.from_receiver_and_sharers(
        tmp_path / "receiver", tmp_path / "sharer", token_alignment="first", fuser_hidden_size=8
    )
    for parameter in model.fuser.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "fuser")
    with safe_open(tmp_path / "fuser" / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"fuser", "token_table_0"}
    loaded = C2CForCausalLM.from_pretrained(tmp_path / "fuser")
    inputs = tokenizers[0](["The sharer reads.", "It lends"], return_tensors="pt", padding=True, padding_side="left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    processor = C2CProcessor(*tokenizers, token_alignment="first")
    made = processor(["The sharer reads.", "It lends"])
    torch.testing.assert_close(model(**made).logits[:, -1], model(**inputs).logits[:, -1], atol=1e-4, rtol=0)
    default = C2CForCausalLM.from_receiver_and_sharers(tmp_path / "receiver", tmp_path / "sharer")
    assert default.config.token_alignments == ["span"]
    with pytest.raises(ValueError, match="`token_alignment='identity'` needs receiver and sharer to have the same"):
        C2CForCausalLM.from_receiver_and_sharers(
            tmp_path / "receiver", tmp_path / "sharer", token_alignment="identity"
        )


def test_other_base_models_are_refused(saved: tuple[C2CForCausalLM, Path], folders: tuple[Path, Path]) -> None:
    model, folder = saved
    with pytest.raises(
        ValueError, match=r"`receiver`: .* layer shapes .* 3 x \(2, 8, 8\), but the model at hand has 2 x"
    ):
        C2CForCausalLM.from_pretrained(folder, receiver=tiny_model("mistral"))
    with pytest.raises(ValueError, match=r"`sharers`: .* layer shapes .* 4 x \(1, 16, 16\), but the model at hand"):
        C2CForCausalLM.from_pretrained(folder, sharers=tiny_model("llama"))
    with pytest.raises(ValueError, match="`sharers`: .* weights' fingerprint .* load the base model that the fuser"):
        C2CForCausalLM.from_pretrained(folder, sharers=tiny_model("gemma3", seed=9))
    C2CForCausalLM.from_pretrained(folder, sharers=tiny_model("gemma3", seed=9), verify_base_models=False)
    with pytest.raises(ValueError, match="`sharers`: this fuser has 1 sharers, but got 2"):
        C2CForCausalLM.from_pretrained(folder, sharers=[*model.sharers, *model.sharers])
    with pytest.raises(TypeError, match="`receiver` must be a transformers model, a Hub id or a folder"):
        C2CForCausalLM.from_pretrained(folder, receiver=torch.nn.Linear(2, 2))
    folders[1].rename(folders[1].with_name("moved"))
    with pytest.raises(ValueError, match="`sharers`: the folder .*sharer' does not exist; hand over the model"):
        C2CForCausalLM.from_pretrained(folder)
    C2CForCausalLM.from_pretrained(folder, sharers=folders[1].with_name("moved"))
    with pytest.raises(ValueError, match=r"These are no fields of `C2CConfig`: \['receivr'\]"):
        C2CForCausalLM.from_pretrained(folder, receivr=model.receiver)


def test_another_revision_is_refused(saved: tuple[C2CForCausalLM, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "receiver_revision": "a" * 40}))
    monkeypatch.setattr("c2c_hf.checkpoints.base_models.resolve_revision", lambda name, kwargs: "b" * 40)
    with pytest.raises(ValueError, match=f"`receiver`: .* revision {'a' * 40}, but the model at hand has {'b' * 40}"):
        C2CForCausalLM.from_pretrained(folder)


def test_damaged_and_foreign_checkpoints_are_refused(
    saved: tuple[C2CForCausalLM, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is truncated or no safetensors file"):
        C2CForCausalLM.from_pretrained(folder)
    weights.write_bytes(pickle.dumps({"fuser": 1}))
    with pytest.raises(ValueError, match="model.safetensors is truncated or no safetensors file"):
        C2CForCausalLM.from_pretrained(folder)
    safetensors.torch.save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(ValueError, match="`num_fuser_layers` is 3, more than the saved weights hold"):
        C2CForCausalLM.from_pretrained(folder)
    changed = safetensors.torch.load(whole)
    name = next(iter(changed))
    changed[name] = torch.zeros(3, 3)
    safetensors.torch.save_file(changed, weights)
    with pytest.raises(ValueError, match=r"The checkpoint does not fit: .* has shape \(3, 3\), but"):
        C2CForCausalLM.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(OSError, match="holds no model.safetensors, so it is no saved fuser"):
        C2CForCausalLM.from_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    safetensors.torch.save_file(changed, tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "weights.bin", 3):
        index.write_text(json.dumps({"weight_map": {name: shard}}))
        with pytest.raises((ValueError, OSError), match="which is no safetensors file in its own folder"):
            C2CForCausalLM.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {name: "gone.safetensors"}}))
    with pytest.raises(OSError, match="lacks the shard gone.safetensors; download or save it anew"):
        C2CForCausalLM.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match="`num_fuser_layers` is 3, more than the saved weights hold"):
        C2CForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[]",
        "3",
        '"weight_map"',
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": {"a": ["x.safetensors"]}}',
        '{"weight_map": {"a": 1, "b": "x.safetensors"}}',
    ],
)
def test_a_damaged_index_is_refused(saved: tuple[C2CForCausalLM, Path], content: str) -> None:
    model, folder = saved
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged; download or save it anew|no safetensors file in its own folder"):
        C2CForCausalLM.from_pretrained(folder, receiver=model.receiver, sharers=list(model.sharers))


def test_an_interrupted_save_leaves_what_was_there(
    saved: tuple[C2CForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with torch.no_grad():
        model.fuser[0].gate_temperature.fill_(0.5)
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="`save_directory` must be a folder"):
        model.save_pretrained(folder / "config.json")


def test_a_save_interrupted_between_shards(
    saved: tuple[C2CForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write, written = transformers.modeling_utils.safe_save_file, []

    def interrupted(tensors, filename, **kwargs):
        if written:
            raise OSError("No space left on device")
        written.append(filename)
        write(tensors, filename, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", interrupted)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder, max_shard_size="4KB")
    assert written
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def _tiny(config_class: type, **kwargs):
    common = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16}
    return AutoModelForCausalLM.from_config(config_class(**{**common, **kwargs}))


_ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 1}

RECURRENT = {
    "Rwkv": lambda: _tiny(RwkvConfig, num_hidden_layers=2, attention_hidden_size=16, context_length=32),
    # Attention in some layers only.
    "Jamba": lambda: _tiny(
        JambaConfig, num_hidden_layers=2, num_experts=2, attn_layer_period=2, attn_layer_offset=1, **_ATTENTION
    ),
    "Qwen3Next": lambda: _tiny(
        Qwen3NextConfig,
        num_hidden_layers=4,
        head_dim=8,
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        **_ATTENTION,
    ),
    "Mamba": lambda: AutoModelForCausalLM.from_config(MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2)),
    "RecurrentGemma": lambda: AutoModelForCausalLM.from_config(
        RecurrentGemmaConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            lru_width=16,
        )
    ),
    "T5": lambda: T5(T5Config(vocab_size=96, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_models_without_plain_caches_are_refused(name: str) -> None:
    model = RECURRENT[name]()
    with pytest.raises(ValueError, match=f"`receiver`: {name}.* has no plain key/value cache per layer"):
        C2CForCausalLM.from_receiver_and_sharers(model, tiny_model("llama"))
    with pytest.raises(ValueError, match=f"`sharers`: {name}.* has no plain key/value cache per layer"):
        C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), model)


@pytest.mark.parametrize("role", ["receiver", "sharer"])
@torch.no_grad()
def test_latent_attention(role: str) -> None:
    """Its latents are cached as keys of one width and values of another, and fuse like any states."""
    torch.manual_seed(0)
    latent = _tiny(
        DeepseekV3Config,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=2,
        eos_token_id=None,
        **_ATTENTION,
    ).eval()
    pair = (latent, tiny_model("llama")) if role == "receiver" else (tiny_model("llama"), latent)
    model = C2CForCausalLM.from_receiver_and_sharers(*pair, token_alignment="identity", fuser_hidden_size=12)
    randomize_fuser(model, seed=0)
    ids = random_ids(11)
    expected, _ = naive_prefill(model, ids, [ids], own_positions(11))
    torch.testing.assert_close(model(input_ids=ids[None]).logits[0], expected, atol=1e-4, rtol=0)
    answer = model.generate(input_ids=ids[None], max_new_tokens=8, do_sample=False)[0, 11:]
    assert torch.equal(answer, naive_greedy(model, ids, [ids], own_positions(11), 8))
    with model.disable_fusion():
        assert not torch.allclose(model(input_ids=ids[None]).logits[0, -1], expected[-1], atol=1e-3)


def test_missing_models_are_refused() -> None:
    with pytest.raises(ValueError, match="`sharers` must name at least one model, but the list is empty"):
        C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), [])
    with pytest.raises(ValueError, match="`config.receiver_config` is missing"):
        C2CForCausalLM(C2CConfig())
    with pytest.raises(ValueError, match="`sharers` must hold at least one model and as many as the configuration"):
        C2CForCausalLM(C2CConfig(receiver_config=CONFIGS["llama"]))
    with pytest.raises(ValueError, match=r"`sharer_kwargs` must be one value, or one per sharer \(1\)"):
        C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), tiny_model("qwen3"), sharer_kwargs=[{}, {}])
    with pytest.raises(
        ValueError, match="needs both tokenizers, but a loaded model without a name or path brings none"
    ):
        C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), tiny_model("qwen3"), token_alignment="first")


def test_a_configuration_alone_makes_random_models() -> None:
    config = C2CConfig(
        receiver_config=CONFIGS["llama"],
        sharers=[SharerConfig(config=CONFIGS["qwen3"], token_alignment="identity", fuser_hidden_size=8)],
    )
    model = C2CForCausalLM(config)
    assert model.generate(input_ids=random_ids(1, 5), max_new_tokens=2, do_sample=False).shape == (1, 7)
    assert config.receiver_layer_shapes == [[2, 8, 8]] * 3


def test_a_living_configuration_loads_again(tmp_path: Path) -> None:
    """The receiver's attention, which a model's configuration carries, is not forced on a sharer that lacks it."""
    for seed, name in enumerate(("llama", "bloom")):
        tiny_model(name, seed).save_pretrained(tmp_path / name)
    model = C2CForCausalLM.from_receiver_and_sharers(
        tmp_path / "llama", tmp_path / "bloom", token_alignment="identity", fuser_hidden_size=8
    )
    model.save_pretrained(tmp_path / "fuser")
    loaded = C2CForCausalLM.from_pretrained(tmp_path / "fuser", config=model.config)
    implementations = [base.config._attn_implementation for base in (loaded.receiver, *loaded.sharers)]
    assert implementations == ["sdpa", "eager"]


def test_a_folder_without_a_fuser_is_named_as_such(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (folders[0], tmp_path / "empty"):
        with pytest.raises((OSError, ValueError), match="no saved fuser"):
            C2CForCausalLM.from_pretrained(folder)
        with pytest.raises((OSError, ValueError), match="no saved fuser"):
            C2CForCausalLM.from_pretrained(folder, receiver=tiny_model("llama"), sharers=tiny_model("gemma3"))


def test_fields_that_are_measured_on_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"measured on the models and cannot be given: \['receiver_revision'\]"):
        C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), tiny_model("qwen3"), receiver_revision="x")


def test_fields_that_do_not_exist_are_refused() -> None:
    """A slip of the pen must not train another fuser than was asked for."""
    with pytest.raises((TypeError, ValueError), match="fuser_hiden_size"):
        C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), tiny_model("qwen3"), fuser_hiden_size=8)


@pytest.mark.parametrize("name", ["to_dict", "num_sharers"])
def test_what_is_no_field_of_the_configuration_is_refused(saved: tuple[C2CForCausalLM, Path], name: str) -> None:
    """Methods and properties of a configuration are none of its fields."""
    model, folder = saved
    with pytest.raises((TypeError, ValueError), match=name):
        C2CForCausalLM.from_pretrained(folder, receiver=model.receiver, sharers=list(model.sharers), **{name: 2})


@pytest.mark.parametrize("loader", [C2CForCausalLM, AutoModelForCausalLM], ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("name", ["attn_implementation", "torch_dtype"])
def test_arguments_are_heeded_or_refused(saved: tuple[C2CForCausalLM, Path], name: str, loader: type) -> None:
    """Those that transformers' users are used to must not be swallowed."""
    _, folder = saved
    try:
        model = loader.from_pretrained(folder, **{name: "eager" if name == "attn_implementation" else torch.bfloat16})
    except (TypeError, ValueError) as error:
        assert name in str(error)
    else:
        for base in (model.receiver, *model.sharers):
            found = base.config._attn_implementation if name == "attn_implementation" else base.dtype
            assert found in ("eager", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16], ids=str)
def test_fingerprints_do_not_depend_on_precision(published: torch.dtype, dtype: torch.dtype) -> None:
    """Of weights published in one precision and loaded in another."""
    model = tiny_model("llama").to(published)
    assert fingerprint(model.to(torch.float32)) == fingerprint(copy.deepcopy(model).to(dtype))
    assert fingerprint(model) != fingerprint(tiny_model("llama", seed=1))
    assert fingerprint(model.to(torch.float16)) is None, "what is rounded twice cannot be compared"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loading_in_another_precision(saved: tuple[C2CForCausalLM, Path], dtype: torch.dtype) -> None:
    _, folder = saved
    loaded = C2CForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.receiver.parameters()} == {dtype}
    assert {parameter.dtype for parameter in loaded.fuser.parameters()} == {torch.float32}
    assert torch.isfinite(loaded(input_ids=random_ids(1, 8)).logits).all()


def test_arguments_of_loading_go_to_every_base_model(
    saved: tuple[C2CForCausalLM, Path], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved
    load, given = AutoModelForCausalLM.from_pretrained, {}

    def recording(name, **kwargs):
        given[Path(name).name] = kwargs
        return load(name, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recording)
    C2CForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map="cpu",
        local_files_only=True,
        sharer_kwargs=[{"attn_implementation": "eager", "dtype": torch.float32}],
    )
    code = {"trust_remote_code": False}
    shared = {"device_map": "cpu", "local_files_only": True, **code}
    assert given == {
        "receiver": {"dtype": torch.bfloat16, **shared},
        "sharer": {"dtype": torch.float32, "attn_implementation": "eager", **shared},
    }
    given.clear()
    C2CForCausalLM.from_receiver_and_sharers(*folders, receiver_kwargs={"dtype": torch.bfloat16}, fuser_hidden_size=8)
    assert given == {"receiver": {"dtype": torch.bfloat16, **code}, "sharer": code}


def test_arguments_reach_the_base_models(saved: tuple[C2CForCausalLM, Path]) -> None:
    _, folder = saved
    model = C2CForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, receiver_kwargs={"attn_implementation": "eager"}
    )
    assert {p.dtype for p in model.receiver.parameters()} == {p.dtype for p in model.sharers.parameters()}
    assert model.dtype == torch.bfloat16, "the fingerprints of a rounded model are those of the whole one"
    assert {p.dtype for p in model.fuser.parameters()} == {torch.float32}
    assert model.receiver.config._attn_implementation == "eager"
    changed = C2CForCausalLM.from_pretrained(folder, fusion_mode="sequential")
    assert changed.config.fusion_mode == "sequential"


def test_base_models_stay_in_evaluation_mode() -> None:
    model = tiny_c2c()
    model.train()
    assert model.fuser.training
    assert not model.receiver.training
    assert not any(module.training for module in model.sharers.modules())
    assert not model.eval().fuser.training
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("fuser.") for name in trained)


def test_alone_ends_with_its_context() -> None:
    model = tiny_c2c()
    with pytest.raises(RuntimeError, match="within"), model.disable_fusion() as same:
        assert same is model
        assert not model.fusion_enabled
        raise RuntimeError("within")
    assert model.fusion_enabled
    with model.disable_fusion():
        with model.disable_fusion():
            pass
        assert not model.fusion_enabled, "the inner context ended the outer one"


def test_alone_is_the_receiver() -> None:
    model, ids = tiny_c2c(), random_ids(2, 9)
    with model.disable_fusion():
        alone = model(input_ids=ids).logits
    assert torch.equal(alone, model.receiver(input_ids=ids).logits)
    assert not torch.allclose(alone[:, -1], model(input_ids=ids).logits[:, -1], atol=1e-2)


def test_saving_hands_every_argument_of_push_to_hub_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict = {}

    def publish(folder: str, repo_id: str, **kwargs: object) -> None:
        pushed.update(repo_id=repo_id, files=sorted(path.name for path in Path(folder).iterdir()), **kwargs)

    monkeypatch.setattr("c2c_hf.modeling_c2c.publish_fuser", publish)
    tokenizer = byte_level_tokenizer()
    options = {"tags": "chat", "subfolder": "small", "license": "mit", "datasets": ["me/data"], "private": True}
    tiny_c2c().save_pretrained(
        tmp_path / "fuser",
        push_to_hub=True,
        repo_id="me/fuser",
        processor=C2CProcessor(tokenizer, tokenizer),
        receiver="me/receiver",
        sharers=["me/sharer"],
        **options,
    )
    assert {"config.json", "model.safetensors", "processor_config.json"} <= set(pushed.pop("files"))
    expected = {
        "repo_id": "me/fuser",
        "receiver": "me/receiver",
        "sharers": ["me/sharer"],
        **options,
        "tags": ["chat"],
    }
    assert pushed == expected


@pytest.mark.parametrize("fields", [{}, {"mode": "memory", "token_alignment": "span", "memory_hidden_size": 8}])
def test_weights_in_8_bits(fields: dict, tmp_path: Path) -> None:
    """A quarter of the size; rounded once: saved and loaded again, they stay the same."""
    model = tiny_c2c("llama", ["qwen3"], **fields)
    randomize_fuser(model, 0)
    model.save_pretrained(tmp_path / "float32")
    model.save_pretrained(tmp_path / "int8", int8=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("float32", "int8")]
    assert sizes[1] < 0.4 * sizes[0]
    bases = {"receiver": model.receiver, "sharers": list(model.sharers)}
    loaded = C2CForCausalLM.from_pretrained(tmp_path / "int8", **bases)
    for (name, before), after in zip(
        model.fuser.state_dict().items(), loaded.fuser.state_dict().values(), strict=True
    ):
        assert after.dtype == before.dtype
        if before.is_floating_point() and before.dim() > 1:
            # At most half a step of each row.
            step = before.abs().amax(-1, keepdim=True) / 127
            assert bool(((after - before).abs() <= 0.5001 * step + 1e-12).all()), name
        else:
            assert torch.equal(after, before)
    loaded.save_pretrained(tmp_path / "again", int8=True)
    again = C2CForCausalLM.from_pretrained(tmp_path / "again", **bases)
    for before, after in zip(loaded.fuser.state_dict().values(), again.fuser.state_dict().values(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    path = tmp_path / "int8" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("weight_scale"))
    weights[name] = weights[name][..., :0]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the scale of fuser\..* has the shape"):
        C2CForCausalLM.from_pretrained(tmp_path / "int8", **bases)
