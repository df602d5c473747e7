"""Training losses: cross-entropy, choice loss of multiple choice questions, distillation, guard loss."""

import itertools

import torch
from torch import nn

from ..inference.inputs import ReceiverInputs
from ..inference.loglikelihood import scores_after
from ..modeling_c2c import C2CForCausalLM, run_receiver
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
        ValueError: The batch has no wrong answers, or a row of several turns.
    """
    if batch.wrong_answer_ids is None or batch.wrong_answer_rows is None:
        raise ValueError("`batch` has no `wrong_answer_ids`, which the choice loss compares with the right answers.")
    is_target = batch.labels != -100
    if bool((is_target[:, 1:] & ~is_target[:, :-1]).sum(1).gt(1).any()):
        raise ValueError("`choice_weight` must be 0 with chats whose turns are one example, as in memory mode.")
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


def guard_losses(model: C2CForCausalLM, batch: TrainingBatch) -> torch.Tensor:
    """Return KL(receiver without sharers || with them) of every token to be learned.

    Args:
        model: The pair.
        batch: Rows with the sharers' inputs of other rows.

    Returns:
        `(num_targets,)`, float32, row by row.
    """
    with torch.no_grad(), model.disable_fusion():
        receiver_logits = model(**batch.model_inputs(fuses=False)).logits
    logits = model(**batch.model_inputs(with_labels=model.config.fuse_response)).logits
    return divergences(batch.labels, receiver_logits, logits)


def distillation_losses(model: C2CForCausalLM, batch: TrainingBatch, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(receiver that prefills the context itself || receiver with memory) of every token to be learned.

    On the receiver's grid `input_ids` holds the context's tokens at the slots, which the receiver runs over here.

    Args:
        model: The pair, in memory mode on the receiver's grid.
        batch: The rows.
        logits: `(batch_size, logits_to_keep, vocab_size)`, of the pair.

    Returns:
        `(num_targets,)`, float32, row by row.
    """
    inputs = ReceiverInputs(batch.input_ids, None, batch.attention_mask, None).with_positions()
    with torch.no_grad():
        outputs = run_receiver(model.receiver, inputs, None, None, False, batch.kept_positions(), {})
    return divergences(batch.labels, outputs.logits[:, -batch.logits_to_keep :], logits)


def divergences(labels: torch.Tensor, receiver_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(receiver || pair) of the next token, where there are labels.

    Args:
        labels: `(batch_size, seq_len)`, -100 where nothing is to be learned.
        receiver_logits: `(batch_size, logits_to_keep, vocab_size)`, of the last positions.
        logits: The same of the pair.

    Returns:
        `(num_targets,)`, float32, row by row.
    """
    kept = logits.shape[1] - 1
    is_target = labels[:, labels.shape[1] - kept :] != -100
    # Picked before they become float32, since there are many of them.
    receiver_logprobs, logprobs = (
        each[:, :-1][is_target.to(each.device)].float().log_softmax(-1) for each in (receiver_logits, logits)
    )
    return nn.functional.kl_div(logprobs, receiver_logprobs, reduction="none", log_target=True).sum(-1)
