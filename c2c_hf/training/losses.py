"""Training losses: cross-entropy of the answers, choice loss of multiple choice questions, guard loss."""

import itertools

import torch
from torch import nn

from ..inference.loglikelihood import scores_after
from ..modeling_c2c import C2CForCausalLM
from .batch_transforms import mismatch_sharers
from .collator import TrainingBatch


def next_tokens(labels: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair logits with the labels that they predict.

    Args:
        labels: `(batch_size, seq_len)`.
        logits: `(batch_size, logits_to_keep, vocab_size)`, of the last positions.

    Returns:
        Labels, `(batch_size, logits_to_keep - 1)`, and logits, `(batch_size, logits_to_keep - 1, vocab_size)`, in
        float32.
    """
    length = logits.shape[1] - 1
    return labels[:, labels.shape[1] - length :].to(logits.device), logits[:, :-1].float()


def answer_losses(labels: torch.Tensor, logits: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross-entropy of every answer token.

    Args:
        labels: `(batch_size, seq_len)`, -100 where nothing is to be learned.
        logits: `(batch_size, logits_to_keep, vocab_size)`, of the last positions.
        label_smoothing: Of the cross-entropy.

    Returns:
        `(batch_size, logits_to_keep - 1)`, float32, 0 where labels are -100.
    """
    targets, logits = next_tokens(labels, logits)
    return nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=-100, reduction="none", label_smoothing=label_smoothing
    )


def choice_losses(
    model: C2CForCausalLM, wrapped: nn.Module, batch: TrainingBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the right and the wrong answers of multiple choice questions; prompts are prefilled and fused once.

    The choice loss is the cross-entropy of the right answer among all, each scored by its mean log-likelihood per
    token: the length-normalized loss of arXiv 2205.05638.

    Args:
        model: The pair.
        wrapped: The same as distributed training wraps it.
        batch: With `wrong_answer_ids` and `wrong_answer_rows`.

    Returns:
        The cross-entropy of every token of the right answers, `(batch_size, length)`, 0 at padding; and the choice
        loss of every question that has wrong answers, `(num_questions,)`.

    Raises:
        ValueError: The batch has no wrong answers.
    """
    if batch.wrong_answer_ids is None or batch.wrong_answer_rows is None:
        raise ValueError("`batch` has no `wrong_answer_ids`, which the choice loss compares with the right answers.")
    answers = [[row[row != -100]] for row in batch.labels]
    for ids, row in zip(batch.wrong_answer_ids, batch.wrong_answer_rows.tolist(), strict=True):
        answers[row].append(ids[ids != -100])
    prompts = batch.prompts()
    outputs = wrapped(**prompts.model_inputs(use_cache=True))
    scores = scores_after(model, outputs, prompts.attention_mask, answers)
    means = (scores.logprobs.sum(1) / scores.is_token.sum(1)).split([len(row) for row in answers])
    choice = torch.stack([-row.log_softmax(0)[0] for row in means if len(row) > 1])
    right_answers = [0, *itertools.accumulate(len(row) for row in answers[:-1])]
    return -scores.logprobs[right_answers], choice


def guard_loss(model: C2CForCausalLM, batch: TrainingBatch) -> torch.Tensor:
    """Return KL(receiver || fused with the sharers' inputs of another row), summed over the answer tokens.

    Args:
        model: The pair.
        batch: Of at least two rows.
    """
    with torch.no_grad(), model.disable_fusion():
        receiver_logits = model(**batch.model_inputs()).logits
    with_labels = model.config.fuse_response
    fused_logits = model(**mismatch_sharers(batch, model.config.mode).model_inputs(with_labels)).logits
    targets, receiver_logits = next_tokens(batch.labels, receiver_logits)
    _, fused_logits = next_tokens(batch.labels, fused_logits)
    is_answer = targets != -100
    receiver_logprobs, fused_logprobs = (
        logits[is_answer].log_softmax(-1) for logits in (receiver_logits, fused_logits)
    )
    return nn.functional.kl_div(fused_logprobs, receiver_logprobs, reduction="sum", log_target=True)
