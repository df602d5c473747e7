"""Padding and truncation of rows of token ids."""

import pytest
import torch
from tokenizers import Tokenizer, processors
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer
from transformers import PreTrainedTokenizerFast

from c2c_hf.alignment.padding import BatchLayout, pad_token_id

TEXTS = ["", "x", "hello ships", "The keeper counted 北京 🎉 ships\n\tbefore breakfast"]


def tokenizer_with_eos() -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(metaspace_tokenizer().backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, metaspace_tokenizer, tokenizer_with_eos])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_truncation_equals_the_tokenizers_own(make_tokenizer, side: str, add_special_tokens: bool) -> None:
    plain, truncating = make_tokenizer(), make_tokenizer()
    truncating.truncation_side = side
    for text in TEXTS:
        encoded = plain(text, add_special_tokens=add_special_tokens, return_special_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
        for max_length in range(2, 30):
            layout = BatchLayout(truncation=True, max_length=max_length)
            kept = [ids[i] for i in layout.kept_positions(mask, plain.model_max_length, side)]
            kwargs = {"add_special_tokens": add_special_tokens, "truncation": True, "max_length": max_length}
            assert kept == truncating(text, **kwargs)["input_ids"]


def test_truncation_without_a_length_takes_the_tokenizers() -> None:
    mask = [1, 0, 0, 0, 0]
    assert BatchLayout(truncation=True).kept_positions(mask, 3, "right") == [0, 1, 2]
    assert BatchLayout(truncation=True).kept_positions(mask, 3, "left") == [0, 3, 4]
    assert BatchLayout(truncation=True).kept_positions(mask, int(1e30), "right") == [0, 1, 2, 3, 4]
    assert BatchLayout(max_length=3).kept_positions(mask, 3, "right") == [0, 1, 2, 3, 4]
    # Special tokens are never removed.
    assert BatchLayout(truncation=True, max_length=1).kept_positions([1, 0, 1], 3, "right") == [0, 2]


def test_padding_is_on_the_left() -> None:
    layout = BatchLayout(pad_to_multiple_of=4)
    assert layout.pad([[5, 6], [7]], 9).tolist() == [[9, 9, 5, 6], [9, 9, 9, 7]]
    assert BatchLayout().pad([[], []], 9).tolist() == [[9], [9]]
    assert BatchLayout(padding="max_length", max_length=3).pad([[5]], 0).tolist() == [[0, 0, 5]]
    assert BatchLayout(padding=False, pad_to_multiple_of=4).pad([[5, 6]], 9).dtype == torch.int64
    assert BatchLayout(return_tensors=None).output(torch.tensor([[1, 2]]), single=True) == [1, 2]
    assert BatchLayout(return_tensors=None).output(torch.tensor([[1, 2]]), single=False) == [[1, 2]]


def test_pad_token_id() -> None:
    tokenizer = metaspace_tokenizer()
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="`padding='max_length'` needs `max_length`"):
        BatchLayout(padding="max_length")
    with pytest.raises(ValueError, match="`padding` must be a bool, .* got 'right'"):
        BatchLayout(padding="right")
