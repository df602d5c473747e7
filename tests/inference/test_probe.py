"""What a model does with caches, positions and padding is found on the model, and every refusal says why."""

from functools import partial

import pytest
import torch
import transformers
from conftest import close_gates, enlarge_weights, pad_rows, random_ids, randomize_fuser, tiny_model
from packaging.version import Version
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    CodeGenConfig,
    GPTJConfig,
    GraniteMoeHybridConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    PreTrainedModel,
    ProphetNetConfig,
    RobertaConfig,
    RoFormerConfig,
    XLMConfig,
)

from c2c_hf import C2CForCausalLM
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.inference.prefill import cached_states, full_length_cache, takes_position_ids
from c2c_hf.inference.probe import _rounds_float32, check_length, check_padding, model_position_ids, probe_model
from c2c_hf.inference.rotary import layer_rotations
from c2c_hf.inference.sharer_cache import prefill_sharer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def build(config_class: type, seed: int = 0, **fields) -> PreTrainedModel:
    torch.manual_seed(seed)
    return enlarge_weights(AutoModelForCausalLM.from_config(config_class(**fields)).eval())


def roberta(seed: int = 0) -> PreTrainedModel:
    return build(RobertaConfig, seed, is_decoder=True, max_position_embeddings=64, **SIZES, **TOKENS)


def bart() -> PreTrainedModel:
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    return build(BartConfig, d_model=32, vocab_size=96, max_position_embeddings=64, **sizes, **TOKENS)


def granite(layer_types: list[str]) -> PreTrainedModel:
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    experts = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 48}
    fields = {**SIZES, "num_key_value_heads": 2, "position_embedding_type": "rope"}
    return build(GraniteMoeHybridConfig, layer_types=layer_types, **fields, **experts, **mamba)


class KeywordPositions(LlamaForCausalLM):
    """Takes position ids, which its signature does not name."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def keyword_positions() -> PreTrainedModel:
    model = KeywordPositions(tiny_model("llama").config)
    model.load_state_dict(tiny_model("llama").state_dict())
    return model.eval()


def pair(receiver: PreTrainedModel, sharer: PreTrainedModel) -> C2CForCausalLM:
    sizes = {"fuser_hidden_size": 16, "fuser_intermediate_size": 16, "fuser_dropout": 0.0}
    return randomize_fuser(
        C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, token_alignment="identity", **sizes), 7
    )


MODELS = {
    "padding_idx": roberta,
    "keywords": keyword_positions,
    "attention layers of a hybrid class": partial(granite, ["attention"] * 2),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_prefills_equal_the_plain_forward(name: str) -> None:
    """As receiver and as sharer, alone and in a padded batch; positions and states are the model's own."""
    model, llama = MODELS[name](), tiny_model("llama", 1)
    rows = [random_ids(length, seed=length) for length in (9, 6)]
    ids, mask = pad_rows(rows, "left"), pad_rows([torch.ones_like(row) for row in rows], "left")
    own = full_length_cache()
    model(input_ids=rows[1][None], use_cache=True, **{CACHE_ARGUMENT: own})
    found = prefill_sharer(model, ids, mask)
    for states, expected in zip(cached_states(found.cache), cached_states(own), strict=True):
        for padded, alone in zip(states, expected, strict=True):
            torch.testing.assert_close(padded[1:, :, 3:], alone, rtol=0, atol=1e-4)
    for receiver, sharer in ((model, llama), (llama, model)):
        c2c = pair(receiver, sharer)
        opened = c2c(input_ids=ids, attention_mask=mask).logits[:, -1]
        for row, logits in zip(rows, opened, strict=True):
            for given in ({}, {"attention_mask": torch.ones_like(row)[None]}):
                torch.testing.assert_close(c2c(input_ids=row[None], **given).logits[0, -1], logits, rtol=0, atol=1e-4)
        close_gates(c2c)
        closed = c2c(input_ids=ids, attention_mask=mask).logits[:, -1]
        for row, logits in zip(rows, closed, strict=True):
            plain = receiver(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits[0, -1]
            torch.testing.assert_close(logits, plain, rtol=0, atol=1e-4)


def test_positions_are_those_of_the_model() -> None:
    model, mask = roberta(), torch.tensor([[0, 0, 1, 1]])
    assert model_position_ids(model, mask).tolist() == [[2, 2, 2, 3]]
    assert model_position_ids(tiny_model("llama"), mask).tolist() == [[0, 0, 0, 1]]
    assert model_position_ids(tiny_model("bloom"), mask) is None
    assert model_position_ids(pair(model, tiny_model("llama")), mask).tolist() == [[2, 2, 2, 3]]
    # Of 64 position embeddings, RoBERTa leaves two unused.
    check_length("receiver", model, 62)
    with pytest.raises(ValueError, match="the text has 63 tokens, but the context of RobertaForCausalLM is 62"):
        check_length("receiver", model, 63)
    assert takes_position_ids(tiny_model("llama"))


@pytest.mark.parametrize(
    "name",
    [
        "Bart",
        pytest.param(
            "RoFormer",
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.24"),
                reason="before transformers 5.24 two chunks give other states than one, for which it is refused",
            ),
        ),
    ],
)
@torch.no_grad()
def test_padding_without_positions_is_refused(name: str) -> None:
    model = bart() if name == "Bart" else build(RoFormerConfig, is_decoder=True, **SIZES, **TOKENS)
    rows = [random_ids(length, seed=length) for length in (9, 6)]
    ids, mask = pad_rows(rows, "left"), pad_rows([torch.ones_like(row) for row in rows], "left")
    # In transformers itself such a row differs.
    plain = model(input_ids=rows[1][None]).logits[:, -1]
    assert (model(input_ids=ids, attention_mask=mask).logits[1:, -1] - plain).abs().max() > 0.01
    for role, bases in {"receiver": (model, tiny_model("llama")), "sharers": (tiny_model("llama"), model)}.items():
        c2c = pair(*bases)
        for run in (c2c, partial(c2c.generate, max_new_tokens=2)):
            with pytest.raises(ValueError, match=f"`{role}`: {name}.* computes a row with padding .* otherwise"):
                run(input_ids=ids, attention_mask=mask)
        # Rows of equal length, and padding behind the text.
        assert c2c(input_ids=rows[0][None], attention_mask=torch.ones(1, 9, dtype=torch.long)).logits.isfinite().all()
        with c2c.disable_fusion():
            assert c2c(input_ids=ids, attention_mask=mask).logits.shape[:2] == (2, 9)
    check_padding("sharers", model, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    check_padding("sharers", tiny_model("llama"), mask)


class Raising(LlamaForCausalLM):
    """Stands for a foreign model that fails in a way of its own."""

    def forward(self, input_ids=None, **kwargs):
        raise KeyError("sliding_attention")


class ForgetfulLayer(nn.Module):
    """A layer whose output depends on how the text is cut."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, *args, **kwargs):
        return self.layer(hidden_states - hidden_states.mean(1, keepdim=True), *args, **kwargs)


def forgetful() -> PreTrainedModel:
    model = tiny_model("llama")
    model.model.layers[1] = ForgetfulLayer(model.model.layers[1])
    return model


REFUSALS = {
    "KeyError": (lambda: Raising(tiny_model("llama").config), "running it on a plain cache raises KeyError: 'slid"),
    "hybrid": (
        partial(granite, ["mamba", "attention"]),
        "layer 0 of its cache holds conv_states and recurrent_states",
    ),
    "chunks": (forgetful, "a text in two chunks gets other states than in one"),
    "ProphetNet": (
        partial(
            build,
            ProphetNetConfig,
            hidden_size=32,
            vocab_size=96,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            max_position_embeddings=64,
        ),
        "(?:prefilling two chunks raises AssertionError|it leaves the cache empty)",
    ),
    "XLM": (
        partial(build, XLMConfig, emb_dim=32, n_layers=2, n_heads=4, vocab_size=96, causal=True),
        "(?:prefilling two chunks raises AssertionError|it leaves the cache empty)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_give_the_reason(name: str) -> None:
    builder, reason = REFUSALS[name]
    model = builder()
    for role, bases in {"receiver": (model, tiny_model("llama")), "sharers": (tiny_model("llama"), model)}.items():
        with pytest.raises(ValueError, match=f"`{role}`: .* has no plain key/value cache per layer.*{reason}"):
            C2CForCausalLM.from_receiver_and_sharers(*bases, token_alignment="identity")


@torch.no_grad()
def test_layers_that_run_several_times() -> None:
    """They cache more layers than the configuration counts, out of order: exact as sharer, refused as receiver."""
    if not hasattr(transformers, "DoryConfig"):
        pytest.skip("this release of transformers has no such model")
    loops = {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2, "head_dim": 8}
    sizes = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2}
    looped = build(transformers.DoryConfig, **sizes, **loops)
    assert len(probe_model(looped, "sharers").layer_shapes) == 6
    with pytest.raises(ValueError, match="`receiver`: Dory.* fills 6 layers .* makes with 4, .* use it as a sharer"):
        pair(looped, tiny_model("llama"))
    c2c, ids = pair(tiny_model("llama"), looped), random_ids(1, 9)
    cached = c2c.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, c2c.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    "config",
    [
        # Angles in a table of sines and cosines.
        GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128, vocab_size=96),
        CodeGenConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=128, n_ctx=128, vocab_size=96),
        # Rotated the other way.
        NanoChatConfig(max_position_embeddings=128, num_key_value_heads=2, **SIZES),
        # A context shorter than the longest probed position.
        RobertaConfig(is_decoder=True, max_position_embeddings=24, **SIZES, **TOKENS),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_rotations_move_keys(config: transformers.PreTrainedConfig) -> None:
    """Keys of a text from position 0 on, moved by 9, are those of the text from position 9 on."""
    torch.manual_seed(0)
    model = enlarge_weights(AutoModelForCausalLM.from_config(config).eval())
    rotations = layer_rotations(model, "receiver")
    if config.model_type == "roberta":
        assert all(len(rotation.inv_freq) == 0 for rotation in rotations)
        return
    ids, positions = random_ids(1, 7), torch.arange(7)
    caches = []
    for start in (0, 9):
        caches.append(full_length_cache())
        model(input_ids=ids, position_ids=positions[None] + start, use_cache=True, **{CACHE_ARGUMENT: caches[-1]})
    for rotation, (keys, _), (moved, _) in zip(rotations, *map(cached_states, caches), strict=True):
        free = rotation.remove(keys[0].transpose(0, 1), positions)
        torch.testing.assert_close(rotation.apply(free, positions + 9).transpose(0, 1), moved[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["cuda", "mkldnn", "all"])
def test_reduced_precision_of_products(backend: str) -> None:
    """`TrainingArguments(tf32=True)` sets it, too; torch refuses to answer the question of older releases then."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch has one setting per backend from 2.9 on")
    place = torch.backends if backend == "all" else getattr(torch.backends, backend).matmul
    before = place.fp32_precision
    assert not _rounds_float32()
    try:
        place.fp32_precision = "tf32"
        assert _rounds_float32() == (torch.backends.cuda.matmul.fp32_precision == "tf32" or backend == "mkldnn")
        assert probe_model(tiny_model("llama"), "receiver").layer_shapes == [(2, 8, 8)] * 3
    finally:
        place.fp32_precision = before
    assert not _rounds_float32()


def test_reduced_precision_by_the_older_setting() -> None:
    try:
        torch.set_float32_matmul_precision("high")
        assert _rounds_float32()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not _rounds_float32()
