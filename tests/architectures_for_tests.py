"""Tiny models of every causal language model type of transformers, and what each does as receiver and sharer.

    python tests/architectures_for_tests.py > docs/architectures.md

writes the table of the documentation; name types to see their rows alone.
"""

import dataclasses
import sys
from functools import partial
from itertools import chain
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, __file__.rsplit("/", 1)[0])

from conftest import enlarge_weights, pad_rows, randomize_fuser, tiny_model  # noqa: E402

from c2c_hf import C2CForCausalLM  # noqa: E402
from c2c_hf._compat import CACHE_ARGUMENT  # noqa: E402
from c2c_hf.inference.prefill import cached_states, full_length_cache  # noqa: E402
from c2c_hf.inference.sharer_cache import prefill_sharer  # noqa: E402

VOCAB = 100
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
#: Unequal in what matters here: positions, windows, layers, caches, and every kind of refusal.
REPRESENTATIVE = (
    *(
        "bart",
        "bloom",
        "codegen",
        "cohere2",
        "deepseek_v3",
        "deepseek_v32",
        "falcon",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
    ),
    *("granitemoehybrid", "llama", "mamba", "mixtral", "nanochat", "opt", "prophetnet", "qwen3_5_text", "roberta"),
    *("smollm3", "xlnet"),
)
ROLES = ("receiver", "sharer", "memory")

#: Value -> the fields that get it in every configuration that has them.
_TINY: dict[Any, str] = {
    32: "hidden_size d_model n_embd emb_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim lru_width attention_hidden_size backbone_hidden_size",
    48: "intermediate_size ffn_dim ffn_hidden_size dff dim_ff d_inner n_inner encoder_ffn_dim decoder_ffn_dim "
    "dense_intermediate_size feed_forward_size intermediate_size_mlp prefix_dense_intermediate_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
    "num_decoder_layers num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads swa_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim qk_rope_head_dim index_topk "
    "gated_norm_rank hc_lowrank linear_num_value_heads linear_num_heads d_rel laurel_rank",
    2: "num_key_value_heads swa_num_key_value_heads sliding_window_pattern global_attn_every_n_layers "
    "no_rope_layer_interval max_window_layers num_experts_per_tok moe_topk moe_k top_k_experts index_n_heads o_groups "
    "hc_mult hc_count linear_num_key_heads n_mamba_heads eos_token_id",
    8: "head_dim swa_head_dim kv_channels dim_head attention_head_size global_head_dim kv_lora_rank qk_nope_head_dim "
    "v_head_dim index_head_dim o_lora_rank linear_key_head_dim linear_value_head_dim linear_head_dim mamba_n_heads "
    "mamba_d_state mamba_chunk_size chunk_size mamba_num_heads mamba_head_dim mamba_d_head ssm_state_size state_size "
    "hidden_size_per_layer_input",
    5: "sliding_window window_size attention_window_size sliding_window_size attention_chunk_size keep_window_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size router_hidden_size shared_experts_intermediate_size",
    1: "num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace "
    "num_dense_layers zero_expert_num bos_token_id",
    0: "num_nextn_predict_layers num_mtp_layers pad_token_id",
    10: "local_attention",
    12: "q_lora_rank",
    64: "mamba_d_ssm rel_extent",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    99: "image_token_id image_token_index",
    98: "video_token_id",
    97: "audio_token_id",
    96: "boi_token_id boi_token_index",
    95: "eoi_token_id eoi_token_index",
    94: "boa_token_id",
    93: "vision_start_token_id",
    92: "vision_end_token_id",
    91: "eoa_token_id eoa_token_index",
}
_FIELDS = {name: value for value, names in _TINY.items() for name in names.split()}
_FIELDS |= dict.fromkeys(("router_jitter_noise", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
_FIELDS |= dict.fromkeys(("dropout", "attention_dropout"), 0.0)
_FIELDS |= {"is_decoder": True, "use_sliding_window": True, "use_mamba_kernels": False, "add_cross_attention": False}
_ENCODER = {"hidden_size": 16, "num_hidden_layers": 1, "depth": 1, "num_heads": 2, "num_attention_heads": 2}
_ENCODER |= {"image_size": 28, "patch_size": 14, "mlp_dim": 16, "output_channels": 16, "vision_output_dim": 16}
_ENCODER |= {"max_source_positions": 16, "num_mel_bins": 8, "num_global_layers": 1, "intermediate_size": 16}
_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
#: Types whose fields depend on one another; `None` leaves a field at its default.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_size": [2], "encoder_hash_byte_group_vocab": 100, "num_hidden_layers": 2},
    "cohere_compass_text": {"rope_parameters": {_FULL: _DEFAULT_ROPE, _SLIDING: _DEFAULT_ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "dots3_note": {
        "vision_config": {"num_hidden_layers": 42, "hidden_size": 8, "intermediate_size": 8, "adapter_in_dim": 8}
    },
    "fuyu": {"patch_size": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_assistant": {
        "text_config": {"num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "got_ocr2": {"vision_config": {"window_size": 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": [_LINEAR, _FULL] * 2},
    "lfm2": {"layer_types": ["conv", _FULL] * 2},
    "lfm2_moe": {"layer_types": ["conv", _FULL] * 2},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": None, "head_dim": 4},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minimax_m3_vl_text": {
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "layer_types": [_FULL, "minimax_m3_sparse"] * 2,
    },
    "moshi": {"audio_vocab_size": 50},
    "mpt": {"attn_config": {"alibi": True}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"attn_layers": ("local", "local"), "axial_pos_embds": False, "local_attn_chunk_length": 8},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
    },
    "xlm": {"causal": True},
    "xlnet": {"d_head": 8, "attn_type": "uni"},
    "xlstm": {"chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": [_LINEAR, "hybrid"] * 4, "num_hidden_layers": 8},
    "zamba2": {"layers_block_type": [_LINEAR, "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
#: Types whose layers are not told by `layer_types` of windows and full attention.
_OWN_LAYER_TYPES = ("axk2", "deepseek_v4", "lara_mini", "lfm3", "minimax", "zaya")


@dataclasses.dataclass
class Outcome:
    """What a type does in one role: `exact`, `exact in equal rows`, `as transformers`, `refused`, `wrong`."""

    status: str
    note: str = ""


def tiny_config(model_type: str) -> transformers.PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_tiny_fields(config_class, model_type))


def _tiny_fields(config_class: type, model_type: str) -> dict[str, Any]:
    own = {field.name for field in dataclasses.fields(config_class)}
    names = own | set(config_class.attribute_map)
    fields = {name: value for name, value in _FIELDS.items() if name in names}
    if {"layer_types", "sliding_window"} <= own and model_type not in _OWN_LAYER_TYPES:
        fields["layer_types"] = [_SLIDING, _FULL] * 2
    defaults = getattr(config_class, "sub_configs_defaults", None) or {}
    for part, part_class in config_class.sub_configs.items():
        part_type = getattr(defaults.get(part), "model_type", None)
        if part_class.__name__ == "AutoConfig":
            if part_type is None:
                continue
            part_class = CONFIG_MAPPING[part_type]
        if not dataclasses.is_dataclass(part_class):
            continue
        if part == "text_config" or "decoder" in part or model_type == "blt":
            fields[part] = _tiny_fields(part_class, part_class.model_type)
        else:
            known = {field.name for field in dataclasses.fields(part_class)}
            fields[part] = {name: value for name, value in {**_FIELDS, **_ENCODER}.items() if name in known}
        if part_type is not None:
            fields[part]["model_type"] = part_type
    if "kv_lora_rank" in names:
        # Latent attention has as many key heads as queries, each of two parts.
        fields["num_key_value_heads"] = fields["num_attention_heads"] = 4
        fields.pop("head_dim", None)
    for name, value in _SPECIAL.get(model_type, {}).items():
        nested = isinstance(value, dict) and isinstance(fields.get(name), dict)
        fields[name] = {**fields[name], **value} if nested else value
    return {name: value for name, value in fields.items() if value is not None}


def tiny_architecture(model_type: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = enlarge_weights(AutoModelForCausalLM.from_config(tiny_config(model_type)).eval().float())
    settings = model.generation_config
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "suppress_tokens", "max_length"):
        setattr(settings, name, None)
    for name in ("begin_suppress_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
        setattr(settings, name, None)
    settings.do_sample, settings.pad_token_id, settings.bos_token_id = False, 0, 1
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e8, "not tiny"
    return model


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry where that is above 1."""
    found, expected = (tensor.detach().float().nan_to_num(0.0, 0.0, 0.0) for tensor in (found, expected))
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1.0))


def batch_of(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": pad_rows(rows, "left"),
        "attention_mask": pad_rows([torch.ones_like(row) for row in rows], "left"),
    }


def with_contexts(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Prompts whose contexts stand behind their first token; the sharer gets that token and the context."""
    texts, sharer_texts, sources = [], [], []
    longest = 1 + max(len(context) for _, context in rows)
    for prompt, context in rows:
        texts.append(torch.cat([prompt[:1], torch.zeros_like(context), prompt[1:]]))
        sharer_texts.append(torch.cat([prompt[:1], context]))
        source = torch.full_like(texts[-1], -1)
        source[1 : 1 + len(context)] = torch.arange(longest - len(context), longest)
        sources.append(source)
    given = {f"sharer_{name}": value for name, value in batch_of(sharer_texts).items()}
    return {**batch_of(texts), **given, "sharer_alignment": pad_rows(sources, "left", -1)}


def padded_error(c2c: C2CForCausalLM, inputs: dict[str, torch.Tensor], alone: torch.Tensor) -> float | None:
    """The error of a padded batch against its rows alone; `None` where the model refuses padding."""
    try:
        return difference(c2c(**inputs).logits[:, -1], alone)
    except ValueError as error:
        if "computes a row with padding" not in str(error):
            raise
        return None


def check_fusion(receiver: PreTrainedModel, sharer: PreTrainedModel, model: PreTrainedModel) -> tuple[float, bool]:
    """Return the largest error of one role, and whether padded rows are refused; `model` is the one in question."""
    sizes = {"fuser_hidden_size": 12, "fuser_intermediate_size": 12, "num_fuser_layers": 3, "fuser_dropout": 0.0}
    c2c = C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, token_alignment="identity", **sizes)
    rows = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (13, 7)]
    errors = []
    for row in rows:
        # New gates are closed.
        plain = receiver(**batch_of([row])).logits[:, -1]
        errors.append(difference(c2c(**batch_of([row])).logits[:, -1], plain))
    randomize_fuser(c2c, 5)
    own, cache = c2c.receiver if model is receiver else c2c.sharers[0], full_length_cache()
    own(input_ids=rows[1][None], use_cache=True, **{CACHE_ARGUMENT: cache})
    alone = torch.cat([c2c(**batch_of([row])).logits[:, -1] for row in rows])
    inputs = batch_of(rows[:1])
    answers = [c2c.generate(**inputs, max_new_tokens=4, use_cache=use_cache)[:, 13:] for use_cache in (True, False)]
    errors.append(float(not torch.equal(*answers)))
    padded = padded_error(c2c, batch_of(rows), alone)
    if padded is None:
        return max(errors), True
    errors.append(padded)
    states = prefill_sharer(own, **batch_of(rows)).cache
    for found, expected in zip(cached_states(states), cached_states(cache), strict=True):
        errors += [difference(found[i][1:, :, 6:], expected[i]) for i in (0, 1)]
    return max(errors), False


def check_memory(build: partial) -> tuple[float, bool]:
    """Receiver and sharer of one type: an empty context, cached decoding, and contexts of unequal length."""
    c2c = C2CForCausalLM.from_receiver_and_sharers(build(), build(seed=1), mode="memory", memory_source_layers=1)
    generator = torch.Generator().manual_seed(3)
    for parameter in c2c.fuser.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    texts = [torch.randint(3, 90, (n,), generator=generator) for n in (6, 3, 14, 8)]
    pairs = list(zip(texts[:2], texts[2:], strict=True))
    prompt = texts[0][None]
    errors = [difference(c2c(**with_contexts([(texts[0], texts[0][:0])])).logits, c2c.receiver(prompt).logits)]
    alone = torch.cat([c2c(**with_contexts([pair])).logits[:, -1] for pair in pairs])
    inputs = with_contexts(pairs[:1])
    length = inputs["input_ids"].shape[1]
    answers = [
        c2c.generate(**inputs, max_new_tokens=4, use_cache=use_cache)[:, length:] for use_cache in (True, False)
    ]
    errors.append(float(not torch.equal(*answers)))
    padded = padded_error(c2c, with_contexts(pairs), alone)
    return max(errors if padded is None else [*errors, padded]), padded is None


def plain_error(model: PreTrainedModel) -> float:
    """How much a model without this package differs between a text in one chunk, in two, and decoded with a cache."""
    ids = torch.randint(3, 90, (1, 13), generator=torch.Generator().manual_seed(13))
    whole, cache = model(input_ids=ids).logits[:, -1], full_length_cache()
    model(input_ids=ids[:, :-1], use_cache=True, **{CACHE_ARGUMENT: cache})
    last = model(input_ids=ids[:, -1:], use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:, -1]
    answers = [model.generate(ids, max_new_tokens=4, use_cache=use_cache)[:, 13:] for use_cache in (True, False)]
    return max(difference(last, whole), float(not torch.equal(*answers)))


@torch.no_grad()
def outcome(model_type: str, role: str) -> Outcome:
    """Build a type's tiny model and run the checks of one role."""
    try:
        build = partial(tiny_architecture, model_type)
        model = build()
    except Exception as error:
        return Outcome("not built", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    llama = partial(tiny_model, "llama", vocab_size=model.get_input_embeddings().weight.shape[0])
    try:
        if role == "memory":
            error, refuses_padding = check_memory(build)
        else:
            pair = (model, llama(1)) if role == "receiver" else (llama(0), model)
            error, refuses_padding = check_fusion(*pair, model)
    except ValueError as error:
        message = str(error)
        if not message.startswith(("`receiver`: ", "`sharers`: ")):
            return Outcome("wrong", f"ValueError: {message[:120]}")
        return Outcome("refused", message.split(": ", 1)[1])
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {str(error)[:120]}")
    if error > 1e-4:
        return Outcome("as transformers" if plain_error(model) > 1e-4 else "wrong", f"differs by {error:.1g}")
    return Outcome("exact in equal rows" if refuses_padding else "exact")


def table_row(model_type: str) -> str:
    """One row of the table: the statuses, and the different notes."""
    found = [outcome(model_type, role) for role in ROLES]
    notes = dict.fromkeys(one.note.replace("|", "\\|").replace("\n", " ") for one in found if one.note)
    return f"| {model_type} | {' | '.join(one.status for one in found)} | {'; '.join(notes)} |"


_HEADER = f"""# Architectures

Every causal language model type of transformers {transformers.__version__} as receiver, as sharer and in memory mode,
made by `python tests/architectures_for_tests.py` on tiny random models in float32.

- *exact*: with closed gates the logits are the receiver's; padded rows equal single rows; the states of a prefill are
  the model's own; decoding with the cache equals recomputation. In memory mode: an empty context changes nothing.
- *exact in equal rows*: the same, but padding in front of a row is refused, because the model takes no positions and
  computes such a row otherwise in transformers itself.
- *as transformers*: the model by itself differs between a text in one and in two chunks.
- *refused*: building raises a `ValueError` with the reason.
- *not built*: transformers does not build the model from its configuration alone.

| type | receiver | sharer | memory | note |
| --- | --- | --- | --- | --- |"""


def main(types: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    for line in chain([_HEADER], map(table_row, types or TYPES)):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
