"""Sums over tokens -> the maps of a memory fuser: ridge regression, of full rank or through a bottleneck."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.utils.logging import tqdm

from ..fusers.memory import MemoryFuser

#: Directions that the search for a bottleneck follows beyond those that it keeps, and its rounds.
_OVERSAMPLING, _ROUNDS = 64, 4


@dataclass
class RidgeReport:
    """How well the receiver's states are predicted, on tokens that were held out.

    Attributes:
        num_tokens: Number of tokens fitted on.
        num_held_out: Number of tokens held out.
        r2_keys: Per receiver layer the share of the variance of its keys (free of position) that is explained.
        r2_values: The same of its values.
        alphas: Per receiver layer the penalty chosen, relative to the mean variance of the features.
        spread_keys: Per receiver layer the standard deviation of its keys over that of the predicted ones.
        spread_values: The same of its values.
        means: Per receiver layer the mean of its keys and values, side by side, as the fuser's maps make them.
        stretch: The power of these spreads by which the maps were stretched, see [`~stretching.stretch_maps`].
    """

    num_tokens: int
    num_held_out: int
    r2_keys: list[float]
    r2_values: list[float]
    alphas: list[float]
    spread_keys: list[float]
    spread_values: list[float]
    means: list[torch.Tensor]
    stretch: float = 0.0


@dataclass
class Sums:
    """Sums over features or targets, and what is held out of them; their size does not depend on the tokens read."""

    total: Any = 0.0
    products: Any = 0.0
    held: list[torch.Tensor] = field(default_factory=list)

    def add(self, own: torch.Tensor, features: torch.Tensor) -> None:
        """Add tokens: their sum, and the products with the features."""
        # Products of a few thousand tokens in float32, sums in float64, which are too large to be copied each time.
        product = features.T @ own
        self.total = self.total + own.double().sum(0)
        self.products = product.double() if isinstance(self.products, float) else self.products.add_(product)


class _Quality(NamedTuple):
    """How well a layer's states are predicted: R2, and how much more they vary than what is predicted."""

    r2_keys: float
    r2_values: float
    spread_keys: float
    spread_values: float


class _Solution(NamedTuple):
    """Maps from features to receiver layers, all of unit size.

    Attributes:
        error: On the tokens held out.
        alpha: The penalty.
        down: `(in_features, rank)`, or `None` for a full rank.
        weight: `(rank or in_features, out_features of all layers)`.
        bias: `(out_features of all layers,)`.
        mean: `(out_features of all layers,)`, of the states.
        quality: Per layer, on the tokens held out.
    """

    error: float
    alpha: float
    down: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    quality: list[_Quality]


def solve_maps(
    fuser: MemoryFuser,
    windows: Mapping[tuple[int, ...], Sums],
    layers: Sequence[Sums],
    num_tokens: int,
    num_held_out: int,
    alphas: Sequence[float],
    progress: bool,
) -> RidgeReport:
    """Write the maps into a fuser.

    Args:
        fuser: Overwritten, its scales included.
        windows: Per group of sharer layers the sums over its features.
        layers: Per receiver layer the sums over its states.
        num_tokens: Number of tokens that were summed up.
        num_held_out: Number of those held out.
        alphas: Penalties to choose among, see [`~ridge.fit_ridge`].
        progress: Show a progress bar.

    Raises:
        ValueError: No penalty is large enough for as few tokens.
    """
    count = len(layers)
    report = RidgeReport(
        num_tokens,
        num_held_out,
        r2_keys=[0.0] * count,
        r2_values=[0.0] * count,
        alphas=[0.0] * count,
        spread_keys=[1.0] * count,
        spread_values=[1.0] * count,
        means=[torch.empty(0)] * count,
    )
    for layer_idx, layer in enumerate(layers):
        heads, key_dim, _ = fuser.receiver_shapes[layer_idx]
        keys, values = torch.cat(layer.held).double().var(0).tensor_split([heads * key_dim])
        fuser.receiver_scales[layer_idx], fuser.receiver_scales[count + layer_idx] = map(_typical_size, (keys, values))
    with tqdm(total=count, desc="Solving", unit="layer", disable=not progress) as bar:
        for sources, window in windows.items():
            mine = [layer_idx for layer_idx, own in enumerate(fuser.sources) if tuple(own) == sources]
            # One bottleneck serves all layers, so that they are solved for together.
            together = [mine] if fuser.down_proj is not None else [[layer_idx] for layer_idx in mine]
            best = _solve_window(fuser, window, layers, together, num_tokens, alphas)
            for layer_indices, solution in zip(together, best, strict=True):
                _write(fuser, layer_indices, solution, report)
                bar.update(len(layer_indices))
    return report


def _typical_size(variances: torch.Tensor) -> float:
    """Return the size of states as a power of two, which no precision rounds."""
    mean = float(variances.mean())
    return 2.0 ** round(math.log2(mean) / 2) if mean > 0 else 1.0


def _solve_window(
    fuser: MemoryFuser,
    window: Sums,
    layers: Sequence[Sums],
    together: Sequence[Sequence[int]],
    num_tokens: int,
    alphas: Sequence[float],
) -> list[_Solution]:
    """Solve for receiver layers that are made from the same features, with the best penalty of each."""
    mean_x = window.total / num_tokens
    sizes_x = torch.ones_like(mean_x)
    variances = window.products.diagonal() / num_tokens - mean_x.square()
    entries = fuser.entries(together[0][0])
    for entry, part, size in zip(
        entries,
        variances.split([fuser.entry_widths[entry] for entry in entries]),
        sizes_x.split([fuser.entry_widths[entry] for entry in entries]),
        strict=True,
    ):
        size.fill_(_typical_size(part))
        fuser.sharer_scales[entry] = size[0]
    mean_x = mean_x / sizes_x
    xx = window.products / sizes_x / sizes_x.unsqueeze(1) - num_tokens * torch.outer(mean_x, mean_x)
    held_x = torch.cat(window.held).double() / sizes_x - mean_x
    targets = [_Targets.of(fuser, layers, layer_indices, num_tokens) for layer_indices in together]
    crossed = [y.products / sizes_x.unsqueeze(1) - num_tokens * torch.outer(mean_x, y.mean) for y in targets]
    best: list[_Solution | None] = [None] * len(together)
    for alpha in alphas:
        penalty = alpha * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        factor, failed = torch.linalg.cholesky_ex(xx + penalty)
        if int(failed):
            continue
        for index, (y, xy) in enumerate(zip(targets, crossed, strict=True)):
            down, weight = _maps(factor, xy, y.rank, num_tokens)
            predicted = held_x @ weight if down is None else held_x @ down @ weight
            error, quality = y.judge(predicted)
            previous = best[index]
            if previous is None or error < previous.error:
                bias = y.mean - (mean_x @ weight if down is None else mean_x @ down @ weight)
                best[index] = _Solution(error, alpha, down, weight, bias, y.mean, quality)
    if any(solution is None for solution in best):
        raise ValueError(f"`alphas`: {list(alphas)} are all too small for {num_tokens} tokens; give larger ones.")
    return [solution for solution in best if solution is not None]


def _maps(
    factor: torch.Tensor, xy: torch.Tensor, rank: int | None, num_tokens: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return bottleneck (hidden states of unit variance) and map; the bottleneck is `None` for a full rank."""
    if rank is None:
        return None, torch.cholesky_solve(xy, factor)
    # Reduced-rank regression: in whitened features the best directions are the singular vectors of the map.
    whitened = torch.linalg.solve_triangular(factor, xy, upper=False)
    devices = [whitened.device] if whitened.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        sketch = min(rank + _OVERSAMPLING, *whitened.shape)
        left, sizes, right = torch.svd_lowrank(whitened, q=sketch, niter=_ROUNDS)
    rank = min(rank, sketch)
    down = torch.linalg.solve_triangular(factor.T, left[:, :rank], upper=True) * num_tokens**0.5
    return down, (right[:, :rank] * sizes[:rank]).T / num_tokens**0.5


class _Targets(NamedTuple):
    """States of receiver layers that are solved for together, of unit size, side by side."""

    products: torch.Tensor
    mean: torch.Tensor
    held: torch.Tensor
    rank: int | None
    #: Widths of every layer's keys and values in turn.
    widths: list[int]

    @classmethod
    def of(cls, fuser: MemoryFuser, layers: Sequence[Sums], layer_indices: Sequence[int], num_tokens: int) -> Any:
        """Put the layers' sums side by side."""
        widths, sizes = [], []
        for layer_idx in layer_indices:
            heads, key_dim, value_dim = fuser.receiver_shapes[layer_idx]
            for entry, width in ((layer_idx, heads * key_dim), (len(layers) + layer_idx, heads * value_dim)):
                widths.append(width)
                sizes.append(fuser.receiver_scales[entry].double().expand(width))
        size = torch.cat(sizes)
        total = torch.cat([layers[layer_idx].total for layer_idx in layer_indices])
        products = torch.cat([layers[layer_idx].products for layer_idx in layer_indices], dim=1)
        held = torch.cat([torch.cat(layers[layer_idx].held) for layer_idx in layer_indices], dim=1).double()
        mean = total / num_tokens / size
        rank = fuser.bottleneck(layer_indices[0])
        return cls(products / size, mean, held / size - mean, rank, widths)

    def judge(self, predicted: torch.Tensor) -> tuple[float, list[_Quality]]:
        """Return the error on held out tokens, and per layer how well it is predicted."""
        errors, totals, sizes = (
            torch.stack([part.sum() for part in states.square().sum(0).split(self.widths)])
            for states in (predicted - self.held, self.held, predicted)
        )
        # What does not vary cannot be stretched.
        spreads = torch.where((sizes > 0) & (totals > 0), totals / sizes, 1.0).sqrt()
        numbers = torch.cat([(1 - errors / totals).view(-1, 2), spreads.view(-1, 2)], dim=1)
        return float(errors.sum()), [_Quality(*layer) for layer in numbers.tolist()]


def _write(fuser: MemoryFuser, layer_indices: Sequence[int], solution: _Solution, report: RidgeReport) -> None:
    """Write a solution into a fuser and a report."""
    widths = []
    for layer_idx in layer_indices:
        heads, key_dim, value_dim = fuser.receiver_shapes[layer_idx]
        widths.append(heads * (key_dim + value_dim))
    parts = (solution.weight.split(widths, dim=1), solution.bias.split(widths), solution.mean.split(widths))
    for layer_idx, weight, bias, mean, quality in zip(layer_indices, *parts, solution.quality, strict=True):
        group = next(group for group in fuser.groups if layer_idx in group.layers)
        index = group.layers.index(layer_idx)
        # A rank beyond that of the map leaves the rest of the bottleneck empty.
        group.out_proj.weight[index].zero_()[:, : len(weight)].copy_(weight.T)
        group.out_proj.bias[index].copy_(bias)
        if solution.down is not None:
            shared: Any = fuser.down_proj
            own = shared.weight if group.down_proj is None else group.down_proj.weight[index]
            own.zero_()[: len(weight)].copy_(solution.down.T)
        if group.residual is not None:
            for parameter in group.residual[-1].parameters():
                parameter[index].zero_()
        report.r2_keys[layer_idx], report.r2_values[layer_idx] = quality.r2_keys, quality.r2_values
        report.spread_keys[layer_idx], report.spread_values[layer_idx] = quality.spread_keys, quality.spread_values
        report.alphas[layer_idx], report.means[layer_idx] = solution.alpha, mean
