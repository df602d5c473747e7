"""A tiny pair with a processor, and small benchmark data in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import randomize_fuser, save_tiny_model, tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor

NEEDS = "evaluation needs the extra `[eval]`"
PROMPTS = [
    "Question: What is the capital of France?\nAnswer:",
    "Question: Who counted the ships before breakfast at the café?\nAnswer:",
    "Question: 北京的秋天短吗？\nAnswer:",
    "Why?",
]
CHOICES = [
    [" Paris", " the keeper said hello"],
    [" the keeper", " ships"],
    [" 很短", " 蓝", " user"],
    [" x", " the user"],
]


def pair(
    sharers: int = 1, chat: bool = True, mode: str = "fusion", receiver: str = "llama", **fields: object
) -> tuple[C2CForCausalLM, C2CProcessor]:
    """A byte-level receiver and metaspace sharers with BOS, strongly fused."""
    template = {} if chat else {"chat_template": None}
    tokenizers = [byte_level_tokenizer(**template), metaspace_tokenizer(), byte_level_tokenizer(vocab_size=330)]
    tokenizers = tokenizers[: sharers + 1]
    names = (receiver, "gemma3", "qwen3")[: sharers + 1]
    models = [tiny_model(name, seed, len(tokenizers[seed])) for seed, name in enumerate(names)]
    model = C2CForCausalLM.from_receiver_and_sharers(
        models[0],
        models[1:],
        token_alignment="span",
        fuser_hidden_size=16,
        fuser_intermediate_size=16,
        mode=mode,
        **fields,
    )
    processor = C2CProcessor.from_config(model.config, tokenizers[0], tokenizers[1:])
    return randomize_fuser(model, 9), processor


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def choice_rows(count: int = 6) -> list[dict[str, Any]]:
    """Questions of unequal length with two to four choices."""
    words = ["ships", "the capital of France", "the keeper", "a café", "北京", "the user's question"]
    return [
        {
            "id": f"q{index}",
            "question": f"What is {words[index % len(words)]}{' before breakfast' * (index % 3)}, number {index}?",
            "choices": [f"{word} {index}" for word in words[: 2 + index % 3]],
            "answer": index % 2,
            "subject": f"subject {index % 2}",
        }
        for index in range(count)
    ]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Data of three benchmarks."""
    folder = tmp_path / "data"
    write_rows(folder / "arc_easy" / "test.jsonl", choice_rows())
    write_rows(folder / "ceval" / "validation.jsonl", choice_rows(4))
    rows = [{"id": f"g{i}", "question": f"What is {i} and {i}?", "answers": [str(2 * i)]} for i in range(3)]
    write_rows(folder / "gsm8k" / "test.jsonl", rows)
    return folder


def save_fuser(folder: Path, name: str) -> Path:
    """Save a tiny pair's base models and, beside them as `name`, its fuser with the processor."""
    receiver = save_tiny_model(folder / "receiver", "llama", byte_level_tokenizer())
    sharer = save_tiny_model(folder / "sharer", "gemma3", metaspace_tokenizer(), seed=1)
    model = C2CForCausalLM.from_receiver_and_sharers(
        receiver, sharer, fuser_hidden_size=16, fuser_intermediate_size=16
    )
    randomize_fuser(model, 3).save_pretrained(folder / name)
    C2CProcessor.from_receiver_and_sharers(receiver, sharer).save_pretrained(folder / name)
    return folder / name
