"""Measures of sets of states: effective rank, and how alike two sets are; a row is a token."""

import torch


def effective_rank(states: torch.Tensor) -> float:
    """Return the exponential of the entropy of the normalized singular values (arXiv 2510.03215, table 2).

    Args:
        states: `(num_tokens, width)`; at most the smaller of the two.
    """
    singular = torch.linalg.svdvals(states.double())
    shares = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def linear_cka(states: torch.Tensor, others: torch.Tensor) -> float:
    """Return the linear centred kernel alignment of two sets of states of the same tokens (arXiv 1905.00414).

    Args:
        states: `(num_tokens, width)`.
        others: `(num_tokens, other width)`.

    Returns:
        From 0 to 1: 1 where one set is a rotation and scaling of the other. 0 where a set does not vary.
    """
    states, others = (own.double() - own.double().mean(0) for own in (states, others))
    norm = (states.T @ states).norm() * (others.T @ others).norm()
    return float((others.T @ states).square().sum() / norm) if norm > 0 else 0.0


def neighbour_overlap(states: torch.Tensor, others: torch.Tensor, count: int = 10) -> float:
    """Return which share of a token's nearest neighbours in one set are its nearest neighbours in the other.

    Args:
        states: `(num_tokens, width)`, at least two tokens.
        others: `(num_tokens, other width)`.
        count: Number of neighbours, at most all other tokens. Two unrelated sets share `count / (num_tokens - 1)`.

    Returns:
        The mean over tokens, from 0 to 1.
    """
    count = min(count, len(states) - 1)
    near = []
    for own in (states, others):
        distances = torch.cdist(own.double(), own.double()).fill_diagonal_(torch.inf)
        near.append(torch.zeros_like(distances).scatter_(1, distances.topk(count, largest=False).indices, 1))
    return float((near[0] * near[1]).sum(1).mean() / count)
