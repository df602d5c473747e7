"""Short hashes that identify a model's weights, a vocabulary and a text."""

import hashlib
import json
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPARABLE = (torch.bfloat16, torch.float32, torch.float64)


class SharerSource(NamedTuple):
    """The sharer that computed a cache; fields that are `None` are not compared.

    Attributes:
        fingerprint: Of its weights, see [`fingerprint`].
        revision: The commit of its repository.
        tokenizer_hash: Of its vocabulary, see [`tokenizer_hash`].
    """

    fingerprint: str | None = None
    revision: str | None = None
    tokenizer_hash: str | None = None


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str | None:
    """Hash a sample of a model's weights, to compare a base model with the one that a fuser was trained with.

    The sample is rounded to bfloat16: loading the same weights in float32 or bfloat16 gives the same hash.

    Returns:
        16 hexadecimal digits; `None` for weights that are quantized, not in memory or in float16, where rounding
        cannot be distinguished from other weights.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    samples = []
    for _, parameter in sorted(model.named_parameters()):
        if parameter.device.type == "meta" or parameter.dtype not in _COMPARABLE:
            return None
        samples.append(parameter.detach().flatten()[:16].to(device="cpu", dtype=torch.bfloat16))
    return hashlib.sha256(torch.cat(samples).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a vocabulary: every token and its id. 16 hexadecimal digits."""
    items = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(items.encode()).hexdigest()[:16]


def text_hash(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> str:
    """Hash a batch of tokens, ids at padding left out. 64 hexadecimal digits.

    Args:
        input_ids: `(batch_size, seq_len)`.
        attention_mask: `(batch_size, seq_len)`.
    """
    mask = attention_mask.detach().cpu() != 0
    ids = input_ids.detach().cpu().long().masked_fill(~mask, -1)
    return hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()
