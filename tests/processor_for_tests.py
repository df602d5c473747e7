"""A processor with small tokenizers, and texts and a chat for it."""

from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer
from transformers import PreTrainedTokenizerBase

from c2c_hf import C2CProcessor

TEXTS = ["hello ships", "The keeper counted 北京 🎉 ships\n\tbefore breakfast", "x"]
CHAT = [
    {"role": "system", "content": "assistant"},
    {"role": "user", "content": " What is the capital of France? "},
    {"role": "assistant", "content": "Paris 北京"},
    {"role": "user", "content": "user"},
]
NAMES = [
    "input_ids",
    "attention_mask",
    "sharer_input_ids",
    "sharer_attention_mask",
    "sharer_alignment",
    "sharer_settings",
]


def sharer_tokenizer(**kwargs: object) -> PreTrainedTokenizerBase:
    return metaspace_tokenizer(**kwargs)


def processor(token_alignment: str | None = None, **kwargs: object) -> C2CProcessor:
    return C2CProcessor.from_receiver_and_sharers(byte_level_tokenizer(), sharer_tokenizer(**kwargs), token_alignment)
