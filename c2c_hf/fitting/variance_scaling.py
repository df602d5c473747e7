"""Variance scaling of a memory fuser's maps: least squares predicts states that vary less than the receiver's own."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.logging import tqdm

from ..fusers.memory import MemoryFuser
from ..inference.loglikelihood import continuation_scores
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .solver import RidgeReport

#: Powers to choose among.
POWERS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0)


@torch.no_grad()
def scale_variance(fuser: MemoryFuser, report: RidgeReport, power: float) -> None:
    """Scale the output of a fuser's maps around its mean.

    Attention over states that vary less than the receiver's own is less concentrated. With a power of 1 they have the
    receiver's variance, layer by layer; answers improve further beyond that (`docs/experiments.md`).

    Args:
        fuser: As fitted; changed in place.
        report: Of the fit.
        power: The scale of a layer is the ratio of the receiver's standard deviation to the predicted one, on the
            held-out tokens, to this power. 0: nothing changes.
    """
    for group in fuser.groups:
        for index, layer_idx in enumerate(group.layers):
            heads, *dims = fuser.receiver_shapes[layer_idx]
            ratios = zip((report.std_ratio_keys[layer_idx], report.std_ratio_values[layer_idx]), dims, strict=True)
            scales = torch.cat([torch.full((heads * dim,), ratio**power) for ratio, dim in ratios])
            weight, bias = (parameter[index] for parameter in group.out_proj.parameters())
            scales, mean = scales.to(weight), report.means[layer_idx].to(bias)
            weight.mul_(scales.unsqueeze(1))
            bias.copy_(mean + (bias - mean) * scales)


@torch.no_grad()
def choose_variance_scale(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    report: RidgeReport,
    questions: Sequence[Mapping[str, Any]],
    sharer_index: int = 0,
    powers: Sequence[float] = POWERS,
    batch_size: int = 8,
    progress: bool = True,
) -> float:
    """Scale a fitted memory fuser by the power with which questions are answered best.

    Args:
        model: A pair with `mode="memory"`, as fitted; changed in place.
        processor: The pair's.
        report: Of the fit; its `variance_scale` is filled in.
        questions: Rows of `sharer_context`, `question` (the receiver's whole prompt), `choices` and `answer` (an
            index). They should not be among those of a test.
        sharer_index: Which sharer's fuser.
        powers: To choose among, in rising order; see [`scale_variance`]. The search ends at the first one that is
            worse than the one before it.
        batch_size: Questions per batch.
        progress: Show a progress bar.

    Returns:
        The power with the highest mean log-likelihood of the right choice among the choices.

    Raises:
        ValueError: There are no questions or no powers, or the model is not in memory mode.
    """
    if not questions or not powers:
        raise ValueError("`questions` and `powers` must hold something to choose by.")
    fuser = model.fuser[sharer_index]
    if not isinstance(fuser, MemoryFuser):
        raise ValueError(f"`model` must have `mode='memory'`, but has {model.config.mode!r}.")
    fitted = [[parameter.detach().clone() for parameter in group.out_proj.parameters()] for group in fuser.groups]

    def scale_fitted(power: float) -> None:
        for group, values in zip(fuser.groups, fitted, strict=True):
            for parameter, value in zip(group.out_proj.parameters(), values, strict=True):
                parameter.copy_(value)
        scale_variance(fuser, report, power)

    best: tuple[float, float] | None = None
    for power in tqdm(powers, desc="Choosing the variance scale", unit="power", disable=not progress):
        scale_fitted(power)
        log_likelihood = _mean_log_likelihood(model, processor, questions, batch_size)
        if best is not None and log_likelihood < best[0]:
            break
        best = (log_likelihood, power)
    report.variance_scale = best[1] if best is not None else 0.0
    scale_fitted(report.variance_scale)
    return report.variance_scale


def _mean_log_likelihood(
    model: C2CForCausalLM, processor: C2CProcessor, questions: Sequence[Mapping[str, Any]], batch_size: int
) -> float:
    """Return the mean log-likelihood of the right choice among the choices of its question."""
    was_training, tokenizer = model.training, processor.tokenizer
    model.eval()
    log_likelihoods = []
    for start in range(0, len(questions), batch_size):
        rows = questions[start : start + batch_size]
        prompts, contexts = [row["question"] for row in rows], [row["sharer_context"] for row in rows]
        inputs = processor(prompts, sharer_context=contexts, padding=True)
        # Tokenized with their prompts, since a token may not start at the boundary otherwise.
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        continuations = [
            [tokenizer(f"{row['question']} {choice}")["input_ids"][length:] for choice in row["choices"]]
            for row, length in zip(rows, lengths, strict=True)
        ]
        scores = iter(continuation_scores(model, inputs, continuations).logprobs.sum(1).cpu())
        for row in rows:
            choices = torch.stack([next(scores) for _ in row["choices"]]).log_softmax(0)
            log_likelihoods.append(float(choices[row["answer"]]))
    model.train(was_training)
    return statistics.fmean(log_likelihoods)
