"""Log-likelihood of continuations of a prompt: one prefill of the prompt, whose cache is reused for all of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .._compat import CACHE_ARGUMENT, accepts_argument, copy_cache
from ..configuration_c2c import C2CConfig
from .cache import C2CCache
from .prefill import last_positions
from .probe import model_position_ids

#: Most logits that are held at once: 1 GiB in float32. A vocabulary of 262,144 words fills it with 1,024 tokens.
MAX_LOGITS = 2**28


class ContinuationScores(NamedTuple):
    """Log-likelihoods of continuations, one row per continuation in the order of the prompts.

    Attributes:
        logprobs: `(num_continuations, max_length)`, float32: of every token given all before it; 0 at padding.
        is_token: `(num_continuations, max_length)`, bool: `False` at padding.
        is_greedy: `(num_continuations,)`, bool: every token is the model's first choice.
    """

    logprobs: torch.Tensor
    is_token: torch.Tensor
    is_greedy: torch.Tensor


def continuation_scores(
    model: PreTrainedModel, inputs: Mapping[str, Any], continuations: Sequence[Sequence[Sequence[int]]]
) -> ContinuationScores:
    """Score continuations; gradients flow where they are enabled.

    Args:
        model: A [`C2CForCausalLM`] or a plain causal language model.
        inputs: The prompts, padded left, as a processor or tokenizer makes them: `input_ids` and `attention_mask`,
            `(batch_size, prompt_len)`, and for C2C the sharer inputs.
        continuations: Per prompt the token ids of its continuations, each of at least one token.

    Raises:
        ValueError: A prompt is padded right, has no continuation, or an empty one.
    """
    mask = inputs["attention_mask"]
    outputs = _run(model, {**inputs, "use_cache": True, "logits_to_keep": 1}, mask)
    return scores_after(model, outputs, mask, continuations)


def scores_after(
    model: PreTrainedModel,
    outputs: CausalLMOutputWithPast,
    mask: torch.Tensor,
    continuations: Sequence[Sequence[Sequence[int]]],
) -> ContinuationScores:
    """Score continuations of prefilled prompts, see [`continuation_scores`].

    Args:
        model: The model.
        outputs: Of the prefill: `logits`, of which the last position is used, and the cache, which is used up.
        mask: `(batch_size, prompt_len)`, the prompts' attention mask.
        continuations: Per prompt the token ids of its continuations.

    Raises:
        ValueError: A prompt is padded right, has no continuation, or an empty one.
    """
    if not bool(mask[:, -1].all()):
        raise ValueError("`inputs` must be padded on the left, but a row of `attention_mask` ends with padding.")
    if len(continuations) != len(mask) or not all(len(row) and all(map(len, row)) for row in continuations):
        raise ValueError(
            f"`continuations` must hold at least one per prompt ({len(mask)} prompts), and none that is empty."
        )
    flat = [torch.as_tensor(ids, device=mask.device) for row in continuations for ids in row]
    rows = torch.tensor([i for i, row in enumerate(continuations) for _ in row], device=mask.device)
    lengths = torch.tensor([len(ids) for ids in flat], device=mask.device)
    ids = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True)
    is_token = torch.arange(ids.shape[1], device=mask.device) < lengths.unsqueeze(1)

    # Splitting saves no memory where gradients are kept, and a cache with response fusion cannot be copied by its
    # states alone.
    whole = torch.is_grad_enabled() or getattr(outputs.get(CACHE_ARGUMENT), "unfused_cache", None) is not None
    size = len(ids) if whole else max(1, MAX_LOGITS // (ids.shape[1] * outputs.logits.shape[-1]))
    parts = []
    for start in reversed(range(0, len(ids), size)):
        part = slice(start, start + size)
        # The first part comes last, and uses up the cache.
        parts.append(_score_part(model, outputs, mask, rows[part], ids[part], is_token[part], keeps_cache=start > 0))
    chosen, greedy = (torch.cat(values) for values in zip(*reversed(parts), strict=True))
    return ContinuationScores(chosen, is_token, greedy)


def _score_part(
    model: PreTrainedModel,
    outputs: CausalLMOutputWithPast,
    mask: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    is_token: torch.Tensor,
    keeps_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-likelihoods of some continuations' tokens, and which continuations are greedy."""
    logits = outputs.logits[:, -1:][rows]
    if ids.shape[1] > 1:
        cache = outputs[CACHE_ARGUMENT]
        if keeps_cache:
            cache = copy_cache(cache.receiver_cache if isinstance(cache, C2CCache) else cache)
        cache.batch_select_indices(rows)
        # The logits of the last token are not needed.
        continued = {"input_ids": ids[:, :-1], "use_cache": True, CACHE_ARGUMENT: cache}
        whole_mask = torch.cat([mask[rows], is_token[:, :-1].to(mask.dtype)], dim=1)
        logits = torch.cat([logits, _run(model, continued, whole_mask).logits], dim=1)
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).masked_fill(~is_token, 0.0)
    return chosen, ((logprobs.argmax(-1) == ids) | ~is_token).all(1)


def _run(model: PreTrainedModel, inputs: dict[str, Any], mask: torch.Tensor) -> CausalLMOutputWithPast:
    inputs["attention_mask"] = mask
    position_ids = model_position_ids(model, mask)
    if position_ids is not None:
        inputs["position_ids"] = position_ids[:, -inputs["input_ids"].shape[1] :]
    if not accepts_argument(model, "logits_to_keep"):
        inputs.pop("logits_to_keep", None)
    elif "logits_to_keep" in inputs and not (isinstance(model.config, C2CConfig) and model.fusion_enabled):
        # As plain models with fusion off, too: slices and indices may differ in the last bit.
        inputs["logits_to_keep"] = last_positions(inputs["input_ids"], inputs["logits_to_keep"])
    return model(**inputs)
