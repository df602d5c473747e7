"""Variance scaling: the variance of the maps' output, and the choice of the power."""

import pytest
import torch
from fitting_for_tests import memory_pair, texts

from c2c_hf.evaluation.methods.answerer import Query
from c2c_hf.evaluation.methods.c2c_answerer import C2CAnswerer
from c2c_hf.fitting.ridge import aligned_states, fit_ridge
from c2c_hf.fitting.variance_scaling import choose_variance_scale, scale_variance

QUESTIONS = [
    {
        "sharer_context": f"The keeper counted {what} .",
        "question": "The keeper counted",
        "choices": ["ships", "breakfast", "Paris"],
        "answer": answer,
    }
    for answer, what in enumerate(["ships", "breakfast", "Paris"])
]


@pytest.mark.parametrize("rank", [None, 3])
def test_as_much_variance_as_the_receivers_own(rank: int | None) -> None:
    """With a power of 1, on the held-out tokens; the mean stays."""
    model, processor = memory_pair(same=False, memory_rank=rank)
    report = fit_ridge(model, processor, texts(15)[:16], alphas=[1e-1], held_out_share=0.5, progress=False)
    assert report.variance_scale == 0
    (fitted_on, _), (sharer_tokens, receiver_tokens) = (
        aligned_states(model, processor, batch, 0, 512) for batch in (texts(15)[:8], texts(15)[8:16])
    )
    fuser = model.fuser[0]

    def made(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        pairs = fuser(tokens)
        return [pair[kind].flatten(1).double() for kind in (0, 1) for pair in pairs]

    before, means = made(sharer_tokens), [states.mean(0) for states in made(fitted_on)]
    scale_variance(fuser, report, 1.0)
    after = made(sharer_tokens)
    assert min(report.std_ratio_keys + report.std_ratio_values) > 1
    for own, states, old, mean in zip(receiver_tokens, after, before, means, strict=True):
        sizes = [(part.double() - mean).square().sum().item() for part in (own, states, old)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)
        assert sizes[2] < sizes[0]
    for states, mean in zip(made(fitted_on), means, strict=True):
        torch.testing.assert_close(states.mean(0), mean, rtol=0, atol=1e-4)


def test_power_zero_changes_nothing() -> None:
    model, processor = memory_pair(same=False)
    report = fit_ridge(model, processor, texts(60), batch_size=4, progress=False)
    before = {name: value.clone() for name, value in model.fuser.state_dict().items()}
    scale_variance(model.fuser[0], report, 0.0)
    torch.testing.assert_close(dict(model.fuser.state_dict()), before)


def test_chooses_the_power_with_the_best_answers() -> None:
    model, processor = memory_pair(same=False)
    report = fit_ridge(model, processor, texts(60), batch_size=4, alphas=[1.0], progress=False)
    fitted = {name: value.clone() for name, value in model.fuser.state_dict().items()}
    likelihoods = {}
    for power in (0.0, 2.0, 40.0):
        model.fuser.load_state_dict(fitted)
        scale_variance(model.fuser[0], report, power)
        answerer = C2CAnswerer(model.eval(), processor)
        scores = answerer.score(
            [Query(row["question"], context=row["sharer_context"]) for row in QUESTIONS],
            [[f" {choice}" for choice in row["choices"]] for row in QUESTIONS],
        )
        table = torch.tensor([[choice.logprob for choice in choices] for choices in scores]).log_softmax(1)
        likelihoods[power] = table.diagonal().mean().item()
    order = sorted(likelihoods, key=lambda power: likelihoods[power])
    # Better and better, or better and then worse.
    for powers in (order, [order[2], order[0], order[1]]):
        model.fuser.load_state_dict(fitted)
        chosen = choose_variance_scale(model, processor, report, QUESTIONS, powers=powers, progress=False)
        assert chosen == report.variance_scale == order[2]
        found = {name: value.clone() for name, value in model.fuser.state_dict().items()}
        model.fuser.load_state_dict(fitted)
        scale_variance(model.fuser[0], report, chosen)
        torch.testing.assert_close(dict(model.fuser.state_dict()), found)


def test_fitting_with_questions_scales_the_variance() -> None:
    maps = []
    for questions in (None, QUESTIONS):
        model, processor = memory_pair(same=False)
        report = fit_ridge(
            model, processor, texts(60), batch_size=4, alphas=[1.0], progress=False, questions=questions
        )
        scale_variance(model.fuser[0], report, -report.variance_scale)
        maps.append(model.fuser.state_dict())
    torch.testing.assert_close(dict(maps[0]), dict(maps[1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`questions` and `powers` must hold something"):
        choose_variance_scale(model, processor, report, [])
