"""Tiny pairs, data and trainers for the tests of training."""

import gzip
import json
from pathlib import Path

import torch
from conftest import enlarge_weights
from datasets import Dataset
from tokenizers_for_tests import TURN_TEMPLATE, byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from c2c_hf import C2CForCausalLM, C2CProcessor, C2CTrainer, C2CTrainingArguments
from c2c_hf.training.dataset import prepare_dataset

CHATS = [
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Is the keeper at the café?"},
        {"role": "assistant", "content": "No, the keeper counted ships."},
    ],
    [
        {"role": "system", "content": "Answer shortly."},
        {"role": "user", "content": "北京的天空?"},
        {"role": "assistant", "content": "蓝"},
    ],
    [{"role": "user", "content": "Say hello to the ships."}, {"role": "assistant", "content": "hello " * 6}],
]


QUESTIONS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in [
        ("What is the capital of France?", "Paris."),
        ("Is the keeper at the café?", "No, at the lighthouse."),
        ("Say hello to the ships.", "hello ships"),
        ("What is blue?", "The sky."),
        ("How many ships before breakfast?", "forty-seven"),
        ("What is short?", "Autumn."),
        ("Where is it?", "for i in range(10)"),
        ("Who is naïve?", "The user"),
    ]
]


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def make_processor(receiver_template: bool = True, sharers: int = 1) -> C2CProcessor:
    receiver = byte_level_tokenizer() if receiver_template else byte_level_tokenizer(chat_template=None)
    others = [metaspace_tokenizer(chat_template=TURN_TEMPLATE), byte_level_tokenizer(350, chat_template=None)]
    return C2CProcessor.from_receiver_and_sharers(receiver, others[:sharers])


PROCESSOR = make_processor()


def chat_rows(chats: list = CHATS) -> Dataset:
    return Dataset.from_list([{"messages": chat} for chat in chats])


def write_rows(path: Path, rows: list[dict]) -> str:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def base_models(sharers: int = 1, dtype: torch.dtype = torch.float32) -> list:
    tokenizers = [PROCESSOR.tokenizer, *make_processor(sharers=sharers).sharer_tokenizers]
    models = []
    for index, tokenizer in enumerate(tokenizers):
        torch.manual_seed(index)
        make = LlamaConfig if index == 0 else Qwen3Config
        config = make(vocab_size=len(tokenizer), num_hidden_layers=2 + index, **_SIZES)
        models.append(enlarge_weights(AutoModelForCausalLM.from_config(config, dtype=dtype)))
    return models


def make_model(sharers: int = 1, dtype: torch.dtype = torch.float32, **fields) -> C2CForCausalLM:
    receiver, *others = base_models(sharers, dtype)
    torch.manual_seed(7)
    fields = {"fuser_hidden_size": 16, "fuser_intermediate_size": 24, "token_alignment": "span", **fields}
    return C2CForCausalLM.from_receiver_and_sharers(receiver, others, **fields)


def make_trainer(folder: Path | str, model: C2CForCausalLM | None = None, **arguments) -> C2CTrainer:
    model = make_model() if model is None else model
    processor = make_processor(sharers=model.config.num_sharers)
    examples = prepare_dataset(chat_rows(QUESTIONS), processor)
    fields = {"per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    trainer_arguments = {name: arguments.pop(name, None) for name in ("peft_config", "compute_metrics")}
    args = C2CTrainingArguments(output_dir=str(folder), use_cpu=True, **{**fields, **arguments})
    return C2CTrainer(model, args, None, examples, examples, processor, **trainer_arguments)


def logged_losses(trainer: C2CTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fuser_weights(trainer: C2CTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.fuser.state_dict().items()}


def save_pair(folder: Path) -> tuple[str, str]:
    folders = []
    for index, model in enumerate(base_models()):
        tokenizer = [PROCESSOR.tokenizer, *PROCESSOR.sharer_tokenizers][index]
        folders.append(str(folder / f"base_{index}"))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders[0], folders[1]
