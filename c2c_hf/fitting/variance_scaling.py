"""Stretching a memory fuser's maps, which least squares makes too flat."""

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
def stretch_maps(fuser: MemoryFuser, report: RidgeReport, power: float) -> None:
    """Stretch what a fuser's maps make, away from its mean.

    Least squares predicts states that vary less than the receiver's own do, and attention over them is flatter. With a
    power of 1 they vary as much, layer by layer; answers get better still beyond that (`docs/experiments.md`).

    Args:
        fuser: As it was fitted; changed in place.
        report: Of the fit.
        power: Of the receiver's own spread over the predicted one, on the tokens held out; 0 changes nothing.
    """
    for group in fuser.groups:
        for index, layer_idx in enumerate(group.layers):
            heads, *dims = fuser.receiver_shapes[layer_idx]
            spreads = zip((report.spread_keys[layer_idx], report.spread_values[layer_idx]), dims, strict=True)
            factors = torch.cat([torch.full((heads * dim,), spread**power) for spread, dim in spreads])
            weight, bias = group.out_proj.weight[index], group.out_proj.bias[index]
            factors, mean = factors.to(weight), report.means[layer_idx].to(bias)
            weight.mul_(factors.unsqueeze(1))
            bias.copy_(mean + (bias - mean) * factors)


@torch.no_grad()
def choose_stretch(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    report: RidgeReport,
    questions: Sequence[Mapping[str, Any]],
    sharer_index: int = 0,
    powers: Sequence[float] = POWERS,
    batch_size: int = 8,
    progress: bool = True,
) -> float:
    """Stretch a fitted memory fuser as far as answers to questions get better by it.

    Args:
        model: A pair with `mode="memory"`, as fitted.
        processor: The pair's.
        report: Of the fit; its `stretch` is filled in.
        questions: Rows of `sharer_context`, `question` (the receiver's whole prompt), `choices` and `answer` (an
            index), as [`~private_facts.private_facts`] makes them. None of them should be among those of a test.
        sharer_index: Which sharer's fuser.
        powers: To choose among, in rising order; see [`stretch_maps`]. Those behind the first that answers worse than
            the one before it are not tried.
        batch_size: Questions answered at once.
        progress: Show a progress bar.

    Returns:
        The power with the highest mean log-likelihood of the right choice among the choices.

    Raises:
        ValueError: There are no questions or no powers.
    """
    if not questions or not powers:
        raise ValueError("`questions` and `powers` must hold something to choose by.")
    fuser: MemoryFuser = model.fuser[sharer_index]
    fitted = [[part.detach().clone() for part in group.out_proj.parameters()] for group in fuser.groups]

    def stretch(power: float) -> None:
        for group, parts in zip(fuser.groups, fitted, strict=True):
            for parameter, part in zip(group.out_proj.parameters(), parts, strict=True):
                parameter.copy_(part)
        stretch_maps(fuser, report, power)

    best: tuple[float, float] | None = None
    for power in tqdm(powers, desc="Stretching", unit="power", disable=not progress):
        stretch(power)
        likelihood = _mean_likelihood(model, processor, questions, batch_size)
        if best is not None and likelihood < best[0]:
            break
        best = (likelihood, power)
    report.stretch = best[1] if best is not None else 0.0
    stretch(report.stretch)
    return report.stretch


def _mean_likelihood(
    model: C2CForCausalLM, processor: C2CProcessor, questions: Sequence[Mapping[str, Any]], batch_size: int
) -> float:
    """Return the mean log-likelihood of right choices, each compared with the other choices of its question."""
    was_training, tokenizer = model.training, processor.tokenizer
    model.eval()
    likelihoods = []
    for start in range(0, len(questions), batch_size):
        rows = questions[start : start + batch_size]
        prompts, contexts = [row["question"] for row in rows], [row["sharer_context"] for row in rows]
        inputs: Any = processor(prompts, sharer_context=contexts, padding=True)
        # Tokenized behind their prompts, where letters may join.
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        continuations = [
            [tokenizer(f"{row['question']} {choice}")["input_ids"][length:] for choice in row["choices"]]
            for row, length in zip(rows, lengths, strict=True)
        ]
        scores = iter(continuation_scores(model, inputs, continuations).logprobs.sum(1).cpu())
        for row in rows:
            compared = torch.stack([next(scores) for _ in row["choices"]]).log_softmax(0)
            likelihoods.append(float(compared[row["answer"]]))
    model.train(was_training)
    return statistics.fmean(likelihoods)
