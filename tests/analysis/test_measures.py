"""Measures with known values."""

import pytest
import torch

from c2c_hf.analysis.measures import effective_rank, linear_cka, neighbour_overlap


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


def test_effective_rank(states: torch.Tensor) -> None:
    orthogonal = torch.linalg.qr(states).Q
    for count in (1, 3, 8):
        assert effective_rank(5 * orthogonal[:, :count]) == pytest.approx(count)
    sizes = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(orthogonal[:, :3] * sizes) == pytest.approx(2**1.5), "an entropy of 1.5 bits"
    assert effective_rank(torch.zeros(4, 3)) == 1


def test_linear_cka(states: torch.Tensor) -> None:
    turned = 3 * states @ torch.linalg.qr(torch.randn(8, 8)).Q + 2
    assert linear_cka(states, turned) == pytest.approx(1)
    # Of unlike width: the Gram matrices' cosine, centred.
    others = states[:, :3] ** 2
    grams = [(own - own.mean(0)) @ (own - own.mean(0)).T for own in (states.double(), others.double())]
    assert linear_cka(states, others) == pytest.approx(
        float((grams[0] * grams[1]).sum() / grams[0].norm() / grams[1].norm())
    )
    assert linear_cka(states, torch.ones(60, 2)) == 0


def test_neighbour_overlap(states: torch.Tensor) -> None:
    assert neighbour_overlap(states, 2 * states + 1) == 1
    assert neighbour_overlap(states, torch.randn(60, 3), count=59) == 1, "all are neighbours"
    unrelated = [
        neighbour_overlap(*torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(seed)), count=10)
        for seed in range(20)
    ]
    assert sum(unrelated) / 20 == pytest.approx(10 / 59, abs=0.02)
