"""Short hashes that identify a model's weights, a vocabulary and a text."""

import hashlib
import json
from typing import NamedTuple

import torch
from torch import nn
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
        16 hexadecimal digits, with a PEFT adapter `+` and 16 more, those of the adapter; `None` for weights that are
        quantized, not in memory or in float16, where rounding cannot be distinguished from other weights.
    """
    quantization = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    # Weights from a GGUF file that are not unpacked have a dtype of their own; others hide theirs.
    if quantization is not None and quantization.quant_method != "gguf":
        return None
    parts = [parameters for parameters in _own_and_adapter_parameters(model) if parameters]
    if any(
        parameter.device.type == "meta" or parameter.dtype not in _COMPARABLE
        for parameters in parts
        for parameter in parameters.values()
    ):
        return None
    return "+".join(_hash_sample(parameters) for parameters in parts)


def without_adapter(value: str | None) -> str | None:
    """Return the part of a fingerprint that is the model's own."""
    return None if value is None else value.partition("+")[0]


def _hash_sample(parameters: dict[str, nn.Parameter]) -> str:
    samples = [
        parameter.detach().flatten()[:16].to(device="cpu", dtype=torch.bfloat16)
        for _, parameter in sorted(parameters.items())
    ]
    return hashlib.sha256(torch.cat(samples).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _own_and_adapter_parameters(model: PreTrainedModel) -> list[dict[str, nn.Parameter]]:
    """Return a model's parameters by the names that they have without an adapter, and those of its PEFT adapter."""
    if not getattr(model, "peft_config", None):
        return [dict(model.named_parameters())]
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
    own: dict[str, nn.Parameter] = {}
    adapter: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        is_adapter = plain == name and name.startswith(wrappers)
        (adapter if is_adapter else own)[plain] = parameter
    return [own, adapter]


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
