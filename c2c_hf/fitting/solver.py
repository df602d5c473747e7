"""Solves for the maps of a memory fuser: ridge regression from sums over tokens, of full rank or reduced rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers.utils.logging import tqdm

from ..fusers.memory import MemoryFuser, MemoryGroup

#: Singular vectors that the randomized decomposition computes beyond those that are kept, and its power iterations.
_OVERSAMPLING, _ITERATIONS = 64, 4


@dataclass
class RidgeReport:
    """How well the receiver's states are predicted, on held-out tokens.

    Attributes:
        num_tokens: Number of tokens fitted on.
        num_held_out: Number of tokens held out.
        r2_keys: Per receiver layer the share of the variance of its keys (free of position) that is explained.
        r2_values: The same of its values.
        alphas: Per receiver layer the penalty chosen, relative to the mean variance of the features.
        std_ratio_keys: Per receiver layer the standard deviation of its keys over that of the predicted ones.
        std_ratio_values: The same of its values.
        means: Per receiver layer the mean of its keys and values, side by side, in the units of the fuser's maps.
        variance_scale: The power of these ratios by which the maps are scaled, see
            [`~fitting.variance_scaling.scale_variance`]. 0: they are not.
    """

    num_tokens: int
    num_held_out: int
    r2_keys: list[float]
    r2_values: list[float]
    alphas: list[float]
    std_ratio_keys: list[float]
    std_ratio_values: list[float]
    means: list[torch.Tensor]
    variance_scale: float = 0.0


@dataclass
class TokenSums:
    """Sums over tokens, whose size does not depend on the number of tokens, and the held-out tokens.

    Attributes:
        total: `(width,)`, float64, the sum of the states.
        products: `(in_features, width)`, float64, the sum of the products of features and states.
        held_out: States of held-out tokens, `(num_tokens, width)` each.
    """

    total: torch.Tensor
    products: torch.Tensor
    held_out: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def zeros(cls, in_features: int, width: int, device: torch.device) -> "TokenSums":
        """Return the sums over no token."""
        total, products = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((width,), (in_features, width))
        )
        return cls(total, products)

    def add(self, states: torch.Tensor, features: torch.Tensor) -> None:
        """Add tokens.

        Args:
            states: `(num_tokens, width)`, float32.
            features: `(num_tokens, in_features)`, float32.
        """
        # Products of a few thousand tokens in float32, sums in float64.
        self.total += states.double().sum(0)
        self.products += features.T @ states


class _Quality(NamedTuple):
    """How well a layer's states are predicted: R2, and the ratio of their standard deviation to the predicted one."""

    r2_keys: float
    r2_values: float
    std_ratio_keys: float
    std_ratio_values: float


class _Solution(NamedTuple):
    """Maps from features to receiver layers, all of unit size.

    Attributes:
        error: Squared error on the held-out tokens.
        alpha: The penalty.
        down: `(in_features, rank)`, or `None` for full rank.
        weight: `(rank or in_features, out_features of all layers)`.
        bias: `(out_features of all layers,)`.
        mean: `(out_features of all layers,)`, of the states.
        quality: Per layer, on the held-out tokens.
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
    features: Mapping[tuple[int, ...], TokenSums],
    layers: Sequence[TokenSums],
    num_tokens: int,
    num_held_out: int,
    alphas: Sequence[float],
    progress: bool,
) -> RidgeReport:
    """Solve for the maps of a fuser and write them into it.

    Args:
        fuser: Overwritten, its scales included.
        features: Per tuple of sharer layers the sums over the features that they give.
        layers: Per receiver layer the sums over its states.
        num_tokens: Number of tokens that were summed up.
        num_held_out: Number of those held out.
        alphas: Penalties to choose among, see [`~fitting.ridge.fit_ridge`].
        progress: Show a progress bar.

    Raises:
        ValueError: No penalty is large enough for as few tokens.
    """
    num_layers = len(layers)
    report = RidgeReport(
        num_tokens,
        num_held_out,
        r2_keys=[0.0] * num_layers,
        r2_values=[0.0] * num_layers,
        alphas=[0.0] * num_layers,
        std_ratio_keys=[1.0] * num_layers,
        std_ratio_values=[1.0] * num_layers,
        means=[torch.empty(0)] * num_layers,
    )
    scales = fuser.receiver_scales
    for layer_idx, layer in enumerate(layers):
        heads, key_dim, _ = fuser.receiver_shapes[layer_idx]
        keys, values = torch.cat(layer.held_out).double().var(0).tensor_split([heads * key_dim])
        scales[layer_idx], scales[num_layers + layer_idx] = _typical_size(keys), _typical_size(values)
    with tqdm(total=num_layers, desc="Solving", unit="layer", disable=not progress) as bar:
        for sources, sums in features.items():
            own_layers = [layer_idx for layer_idx, own in enumerate(fuser.sources) if tuple(own) == sources]
            # Layers that share one bottleneck are solved for together.
            together = [own_layers] if fuser.down_proj is not None else [[layer_idx] for layer_idx in own_layers]
            solutions = _solve_layers(fuser, sums, layers, together, num_tokens, alphas)
            for layer_indices, solution in zip(together, solutions, strict=True):
                _write(fuser, layer_indices, solution, report)
                bar.update(len(layer_indices))
    return report


def _typical_size(variances: torch.Tensor) -> float:
    """Return the size of states as a power of two, which no precision rounds."""
    mean = float(variances.mean())
    return 2.0 ** round(math.log2(mean) / 2) if mean > 0 else 1.0


def _solve_layers(
    fuser: MemoryFuser,
    features: TokenSums,
    layers: Sequence[TokenSums],
    together: Sequence[Sequence[int]],
    num_tokens: int,
    alphas: Sequence[float],
) -> list[_Solution]:
    """Solve for receiver layers of the same features, with the best penalty for each item of `together`."""
    mean_x = features.total / num_tokens
    sizes_x = torch.ones_like(mean_x)
    variances = features.products.diagonal() / num_tokens - mean_x.square()
    entries = fuser.entries(together[0][0])
    widths = [fuser.entry_widths[entry] for entry in entries]
    for entry, part, size in zip(entries, variances.split(widths), sizes_x.split(widths), strict=True):
        size.fill_(_typical_size(part))
        fuser.sharer_scales[entry] = size[0]
    mean_x = mean_x / sizes_x
    xx = features.products / sizes_x / sizes_x.unsqueeze(1) - num_tokens * torch.outer(mean_x, mean_x)
    held_out_x = torch.cat(features.held_out).double() / sizes_x - mean_x
    targets = [_Targets.of_layers(fuser, layers, layer_indices, num_tokens) for layer_indices in together]
    products = [y.products / sizes_x.unsqueeze(1) - num_tokens * torch.outer(mean_x, y.mean) for y in targets]
    best: list[_Solution | None] = [None] * len(together)
    for alpha in alphas:
        penalty = alpha * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        factor, failed = torch.linalg.cholesky_ex(xx + penalty)
        if int(failed):
            continue
        for index, (y, xy) in enumerate(zip(targets, products, strict=True)):
            down, weight = _maps(factor, xy, y.rank, num_tokens)
            predicted = held_out_x @ weight if down is None else held_out_x @ down @ weight
            error, quality = y.evaluate(predicted)
            previous = best[index]
            if previous is None or error < previous.error:
                bias = y.mean - (mean_x @ weight if down is None else mean_x @ down @ weight)
                best[index] = _Solution(error, alpha, down, weight, bias, y.mean, quality)
    solutions = [solution for solution in best if solution is not None]
    if len(solutions) < len(best):
        raise ValueError(f"`alphas`: {list(alphas)} are all too small for {num_tokens} tokens; give larger ones.")
    return solutions


def _maps(
    factor: torch.Tensor, xy: torch.Tensor, rank: int | None, num_tokens: int
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return bottleneck (hidden states of unit variance) and map; the bottleneck is `None` for full rank."""
    if rank is None:
        return None, torch.cholesky_solve(xy, factor)
    # Reduced-rank regression: in whitened features the best directions are the singular vectors of the map.
    whitened = torch.linalg.solve_triangular(factor, xy, upper=False)
    devices = [whitened.device] if whitened.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        sketch = min(rank + _OVERSAMPLING, *whitened.shape)
        left, sizes, right = torch.svd_lowrank(whitened, q=sketch, niter=_ITERATIONS)
    rank = min(rank, sketch)
    down = torch.linalg.solve_triangular(factor.T, left[:, :rank], upper=True) * num_tokens**0.5
    return down, (right[:, :rank] * sizes[:rank]).T / num_tokens**0.5


class _Targets(NamedTuple):
    """States of receiver layers that are solved for together, of unit size, side by side.

    Attributes:
        products: `(in_features, out_features of all layers)`, sums of the products with the features.
        mean: `(out_features of all layers,)`.
        held_out: `(num_tokens, out_features of all layers)`, without their mean.
        rank: Of the map. `None`: full.
        widths: Of each layer's keys and values in turn.
    """

    products: torch.Tensor
    mean: torch.Tensor
    held_out: torch.Tensor
    rank: int | None
    widths: list[int]

    @classmethod
    def of_layers(
        cls, fuser: MemoryFuser, layers: Sequence[TokenSums], layer_indices: Sequence[int], num_tokens: int
    ) -> "_Targets":
        """Put the sums of layers side by side."""
        widths, sizes = [], []
        for layer_idx in layer_indices:
            heads, key_dim, value_dim = fuser.receiver_shapes[layer_idx]
            for entry, width in ((layer_idx, heads * key_dim), (len(layers) + layer_idx, heads * value_dim)):
                widths.append(width)
                sizes.append(fuser.receiver_scales[entry].double().expand(width))
        size = torch.cat(sizes)
        total = torch.cat([layers[layer_idx].total for layer_idx in layer_indices])
        products = torch.cat([layers[layer_idx].products for layer_idx in layer_indices], dim=1)
        held_out = torch.cat([torch.cat(layers[layer_idx].held_out) for layer_idx in layer_indices], dim=1).double()
        mean = total / num_tokens / size
        rank = fuser.bottleneck(layer_indices[0])
        return cls(products / size, mean, held_out / size - mean, rank, widths)

    def evaluate(self, predicted: torch.Tensor) -> tuple[float, list[_Quality]]:
        """Return the squared error on held-out tokens, and how well each layer is predicted."""
        errors, variances, predicted_variances = (
            torch.stack([part.sum() for part in states.square().sum(0).split(self.widths)])
            for states in (predicted - self.held_out, self.held_out, predicted)
        )
        # Constant states have no scale.
        varies = (predicted_variances > 0) & (variances > 0)
        std_ratios = torch.where(varies, variances / predicted_variances, 1.0).sqrt()
        numbers = torch.cat([(1 - errors / variances).view(-1, 2), std_ratios.view(-1, 2)], dim=1)
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
        own_weight, own_bias = (parameter[index] for parameter in group.out_proj.parameters())
        # A rank beyond that of the map leaves the rest of the bottleneck empty.
        own_weight.zero_()[:, : len(weight)].copy_(weight.T)
        own_bias.copy_(bias)
        if solution.down is not None:
            for down_weight in _down_weights(fuser, group, index):
                down_weight.zero_()[: len(weight)].copy_(solution.down.T)
        if group.residual is not None:
            for parameter in group.residual[-1].parameters():
                parameter[index].zero_()
        report.r2_keys[layer_idx], report.r2_values[layer_idx] = quality.r2_keys, quality.r2_values
        report.std_ratio_keys[layer_idx] = quality.std_ratio_keys
        report.std_ratio_values[layer_idx] = quality.std_ratio_values
        report.alphas[layer_idx], report.means[layer_idx] = solution.alpha, mean


def _down_weights(fuser: MemoryFuser, group: MemoryGroup, index: int) -> list[torch.Tensor]:
    """Return the bottleneck weight in front of a layer's map, shared or its own, `(rank, in_features)` each."""
    own = [] if group.down_proj is None else [group.down_proj.weight[index]]
    return own if fuser.down_proj is None else [fuser.down_proj.weight]
