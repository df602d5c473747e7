"""Special tokens that stand in a text: split, so that no tokenizer takes them for more than text."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

#: Where a text is tokenized in two parts. A noncharacter of Unicode, which no text that is interchanged holds.
BREAK = "\ufdd0"

Value = TypeVar("Value")


def special_token_splitter(tokenizers: Sequence[PreTrainedTokenizerBase]) -> Callable[[str], str]:
    """Return a function that puts [`BREAK`] into every special token of any of the tokenizers that a text holds.

    Args:
        tokenizers: Of all models, so that a text is split in the same places for all of them.
    """
    specials = {
        token.content
        for tokenizer in tokenizers
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and len(token.content) > 1
    }
    if not specials:
        return lambda text: text.replace(BREAK, "")
    # Looked ahead, so that special tokens that overlap are all found.
    pattern = re.compile(f"(?=(?:{'|'.join(map(re.escape, sorted(specials)))}))(.)", re.DOTALL)
    return lambda text: pattern.sub(lambda match: match[1] + BREAK, text.replace(BREAK, ""))


def split_strings(value: Value, split: Callable[[str], str]) -> Value:
    """Apply a function to every string in nested lists and dictionaries, but the roles and types of messages."""
    if isinstance(value, str):
        return split(value)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {  # type: ignore[return-value]
            key: item if key in ("role", "type") else split_strings(item, split) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [split_strings(item, split) for item in value]  # type: ignore[return-value]
    return value
