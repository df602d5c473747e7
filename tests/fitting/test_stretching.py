"""Stretched maps: how much what they make varies, and how far is chosen."""

import pytest
import torch
from test_ridge import memory_pair, texts

from c2c_hf.evaluation.answering import Query
from c2c_hf.evaluation.fused_answering import C2CAnswerer
from c2c_hf.fitting.ridge import _read_both, fit_ridge
from c2c_hf.fitting.variance_scaling import choose_stretch, stretch_maps

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
    """With a power of 1 on the tokens held out, by the definition of the spreads; the mean stays."""
    model, processor = memory_pair(same=False, memory_rank=rank)
    report = fit_ridge(model, processor, texts(15)[:16], alphas=[1e-1], held_out_share=0.5, progress=False)
    assert report.stretch == 0
    (fitted_on, _), (sharer_tokens, receiver_tokens) = (
        _read_both(model, processor, batch, 0, 512) for batch in (texts(15)[:8], texts(15)[8:16])
    )
    fuser = model.fuser[0]

    def made(tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        pairs = fuser(tokens)
        return [pair[kind].flatten(1).double() for kind in (0, 1) for pair in pairs]

    before, means = made(sharer_tokens), [states.mean(0) for states in made(fitted_on)]
    stretch_maps(fuser, report, 1.0)
    after = made(sharer_tokens)
    assert min(report.spread_keys + report.spread_values) > 1
    for own, states, old, mean in zip(receiver_tokens, after, before, means, strict=True):
        sizes = [(part.double() - mean).square().sum().item() for part in (own, states, old)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)
        assert sizes[2] < sizes[0]
    for states, mean in zip(made(fitted_on), means, strict=True):
        torch.testing.assert_close(states.mean(0), mean, rtol=0, atol=1e-4)


def test_no_power_changes_nothing() -> None:
    model, processor = memory_pair(same=False)
    report = fit_ridge(model, processor, texts(60), batch_size=4, progress=False)
    before = {name: value.clone() for name, value in model.fuser.state_dict().items()}
    stretch_maps(model.fuser[0], report, 0.0)
    torch.testing.assert_close(dict(model.fuser.state_dict()), before)


def test_chooses_what_answers_best() -> None:
    model, processor = memory_pair(same=False)
    report = fit_ridge(model, processor, texts(60), batch_size=4, alphas=[1.0], progress=False)
    fitted = {name: value.clone() for name, value in model.fuser.state_dict().items()}
    likelihoods = {}
    for power in (0.0, 2.0, 40.0):
        model.fuser.load_state_dict(fitted)
        stretch_maps(model.fuser[0], report, power)
        answerer = C2CAnswerer(model.eval(), processor)
        scores = answerer.score(
            [Query(row["question"], context=row["sharer_context"]) for row in QUESTIONS],
            [[f" {choice}" for choice in row["choices"]] for row in QUESTIONS],
        )
        table = torch.tensor([[choice.logprob for choice in choices] for choices in scores]).log_softmax(1)
        likelihoods[power] = table.diagonal().mean().item()
    order = sorted(likelihoods, key=lambda power: likelihoods[power])
    # Rising towards the best, then one that is worse.
    for powers in (order, [order[2], order[0], order[1]]):
        model.fuser.load_state_dict(fitted)
        chosen = choose_stretch(model, processor, report, QUESTIONS, powers=powers, progress=False)
        assert chosen == report.stretch == order[2]
        found = {name: value.clone() for name, value in model.fuser.state_dict().items()}
        model.fuser.load_state_dict(fitted)
        stretch_maps(model.fuser[0], report, chosen)
        torch.testing.assert_close(dict(model.fuser.state_dict()), found)


def test_fitting_with_questions_stretches() -> None:
    maps = []
    for questions in (None, QUESTIONS):
        model, processor = memory_pair(same=False)
        report = fit_ridge(
            model, processor, texts(60), batch_size=4, alphas=[1.0], progress=False, questions=questions
        )
        stretch_maps(model.fuser[0], report, -report.stretch)
        maps.append(model.fuser.state_dict())
    torch.testing.assert_close(dict(maps[0]), dict(maps[1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`questions` and `powers` must hold something"):
        choose_stretch(model, processor, report, [])
