"""Losses of a training batch beside the plain one of the next token."""

import itertools
from typing import Any

import torch
from torch import nn

from ..inference.loglikelihood import scores_after
from ..modeling_c2c import C2CForCausalLM
from .collator import as_list, other_rows


def shifted(labels: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels that the last logits but one predict, and those logits in float32."""
    length = logits.shape[1] - 1
    return labels[:, labels.shape[1] - length :].to(logits.device), logits[:, :-1].float()


def choice_losses(
    model: C2CForCausalLM, wrapped: nn.Module, inputs: dict[str, Any], wrong: torch.Tensor, wrong_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the right and the wrong answers of a batch; the prompt is read and fused once.

    Args:
        model: The pair.
        wrapped: The same as distributed training wraps it.
        inputs: A batch of [`C2CDataCollator`], `labels` included.
        wrong: Its `wrong_answer_ids`.
        wrong_rows: Its `wrong_answer_rows`.

    Returns:
        The loss of every token of the right answers, `(batch_size, length)`, 0 at padding; and the cross-entropy of
        the right answer among all, each scored by its mean log-likelihood per token, `(num_questions,)`, of the rows
        that have wrong ones.
    """
    labels, prompt_length = inputs["labels"], inputs["input_ids"].shape[1] - inputs["logits_to_keep"] + 1
    prompt = {name: value for name, value in inputs.items() if name not in ("labels", "logits_to_keep")}
    for name in ("input_ids", "attention_mask", "sharer_alignment"):
        cut = [value[:, :prompt_length] for value in as_list(inputs[name])]
        prompt[name] = cut if isinstance(inputs[name], list) else cut[0]
    answers = [[row[row != -100]] for row in labels]
    for ids, index in zip(wrong, wrong_rows.tolist(), strict=True):
        answers[index].append(ids[ids != -100])
    outputs = wrapped(**prompt, use_cache=True, logits_to_keep=1)
    scores = scores_after(model, outputs, prompt["attention_mask"], answers)
    means = (scores.logprobs.sum(1) / scores.is_token.sum(1)).split([len(row) for row in answers])
    choice = torch.stack([-row.log_softmax(0)[0] for row in means if len(row) > 1])
    rights = [0, *itertools.accumulate(len(row) for row in answers[:-1])]
    return -scores.logprobs[rights], choice


def guard_loss(
    model: C2CForCausalLM, inputs: dict[str, Any], asked: dict[str, Any], labels: torch.Tensor
) -> torch.Tensor:
    """Return KL(receiver alone || fused with another row's sharers), summed over the answer tokens.

    Args:
        model: The pair.
        inputs: A batch of [`C2CDataCollator`].
        asked: What goes to the model besides.
        labels: Those of the batch.
    """
    with torch.no_grad(), model.disable_fusion():
        alone = model(**{**inputs, **asked, "labels": None}).logits
    fused = model(**{**other_rows(inputs), **asked}).logits
    targets, alone = shifted(labels, alone)
    _, fused = shifted(labels, fused)
    answers = targets != -100
    alone, fused = alone[answers].log_softmax(-1), fused[answers].log_softmax(-1)
    return nn.functional.kl_div(fused, alone, reduction="sum", log_target=True)
