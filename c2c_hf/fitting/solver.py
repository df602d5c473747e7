"""Ridge regression: the maps of a memory fuser, of full or reduced rank, and which sharer layers suit a layer best."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers.utils.logging import tqdm

from ..fusers.memory import MemoryFuser

#: Singular vectors that the randomized decomposition computes beyond those that are kept, and its power iterations.
_OVERSAMPLING, _ITERATIONS = 64, 4
#: Penalty with which single layers are compared, relative to the mean variance.
_SELECTION_ALPHA = 1e-2
#: The block of token embeddings; the others are source layers.
_EMBEDDINGS = -1

Key = TypeVar("Key")


@dataclass
class RidgeReport:
    """How well the receiver's states are predicted, on held-out tokens.

    Attributes:
        num_tokens: Number of tokens fitted on.
        num_held_out: Number of tokens held out.
        r2_keys: Per receiver layer the share of the variance of its keys (free of position) that is explained, the
            mean over dimensions.
        r2_values: The same of its values.
        alphas: Per receiver layer the penalty chosen, relative to the mean variance of the features.
        source_layers: Per receiver layer the sharer layers that it is predicted from.
    """

    num_tokens: int
    num_held_out: int
    r2_keys: list[float]
    r2_values: list[float]
    alphas: list[float]
    source_layers: list[list[int]]


def layer_targets(fuser: MemoryFuser, receiver_states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Standardize the receiver's states: per layer keys and values side by side, `(num_tokens, width)`."""
    dtype, num_layers = fuser.receiver_mean.dtype, len(fuser.receiver_shapes)
    means, scales = (buffer.split(fuser.receiver_widths) for buffer in (fuser.receiver_mean, fuser.receiver_scale))
    states = [(own.to(dtype) - mean) / scale for own, mean, scale in zip(receiver_states, means, scales, strict=True)]
    return [torch.cat([states[i], states[num_layers + i]], dim=-1) for i in range(num_layers)]


def _explained(truth: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Return per dimension the share of the variance that is explained; 1 where nothing varies."""
    error, variance = (truth - predicted).square().sum(0), (truth - truth.mean(0)).square().sum(0)
    return 1 - error / torch.where(variance > 0, variance, error.clamp_min(1e-12))


def mean_and_scale(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation per dimension of `(num_tokens, width)`.

    Dimensions that hardly vary are not blown up: their scale is at least 2 % of the mean one.
    """
    scale = states.std(0)
    return states.mean(0), scale.clamp_min(0.02 * float(scale.mean()) or 1.0)


def score_source_layers(features: Iterable[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Say how well each sharer layer alone predicts each receiver layer's states, on held-out tokens.

    Args:
        features: Per sharer layer `(num_tokens, in_features)`, standardized; one at a time is held in memory.
        targets: Per receiver layer `(num_tokens, width)`, standardized. The last quarter of the tokens is held out.

    Returns:
        `(num_sharer_layers, num_receiver_layers)`: the share of the variance that is explained, the mean over
        dimensions.
    """
    widths, target = [own.shape[1] for own in targets], torch.cat(list(targets), dim=-1)
    num_fitted = len(target) - len(target) // 4
    scores = []
    for layer_features in features:
        fitted = layer_features[:num_fitted]
        xx = fitted.T @ fitted
        penalty = _SELECTION_ALPHA * xx.diagonal().mean() * torch.eye(len(xx)).to(xx)
        weight = torch.linalg.solve(xx + penalty, fitted.T @ target[:num_fitted])
        quality = _explained(target[num_fitted:], layer_features[num_fitted:] @ weight)
        scores.append(torch.stack([part.mean() for part in quality.split(widths)]))
    return torch.stack(scores).cpu()


def choose_source_layers(scores: torch.Tensor, count: int) -> list[list[int]]:
    """Choose per receiver layer the sharer layers of the best scores, in ascending order.

    Args:
        scores: Of [`score_source_layers`].
        count: Number of layers to choose, at most all.
    """
    count = min(count, len(scores))
    return [sorted(column.topk(count).indices.tolist()) for column in scores.T]


class MapSums:
    """Sums over tokens, whose size does not depend on their number, and the held-out tokens.

    The features of a receiver layer are blocks side by side: one per source layer, and the token embeddings. Layers
    share blocks, so each product of two blocks is summed up once.

    Args:
        fuser: Standardizes the states and names the source layers.

    Attributes:
        num_tokens: Number of tokens summed up.
        num_held_out: Number of tokens held out.
    """

    def __init__(self, fuser: MemoryFuser) -> None:
        self._fuser = fuser
        self.num_tokens = self.num_held_out = 0
        # Receiver layers with the same source layers have the same features.
        self._layers: dict[tuple[int, ...], list[int]] = {}
        #: Receiver layers that are predicted from each block.
        self._targets: dict[int, list[int]] = {}
        for layer_idx, sources in enumerate(fuser.source_layers):
            self._layers.setdefault(tuple(sources), []).append(layer_idx)
            for block in self._blocks(sources):
                self._targets.setdefault(block, []).append(layer_idx)
        self._pairs = {
            (first, second)
            for sources in self._layers
            for first, second in itertools.combinations_with_replacement(sorted(self._blocks(sources)), 2)
        }
        self._held_out: list[tuple[list[torch.Tensor], torch.Tensor | None, list[torch.Tensor]]] = []
        self._x_sums: dict[int, torch.Tensor] = {}
        self._y_sums: dict[int, torch.Tensor] = {}
        self._xx: dict[tuple[int, int], torch.Tensor] = {}
        self._xy: dict[tuple[int, int], torch.Tensor] = {}

    def _blocks(self, sources: Sequence[int]) -> list[int]:
        """Return the blocks of a receiver layer's features, in order: source layers, and `_EMBEDDINGS`."""
        return [*sources, _EMBEDDINGS] if self._fuser.num_token_embeddings else list(sources)

    def _prepare(
        self, sharer_states: Sequence[torch.Tensor], receiver_states: Sequence[torch.Tensor], embeddings: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, list[torch.Tensor]]:
        entries, standardized = self._fuser.standardize(sharer_states, embeddings)
        return entries, standardized, layer_targets(self._fuser, receiver_states)

    def hold_out(
        self, sharer_states: Sequence[torch.Tensor], receiver_states: Sequence[torch.Tensor], embeddings: torch.Tensor
    ) -> None:
        """Keep tokens by which the maps are evaluated; arguments as in [`MapSums.add`]."""
        self.num_held_out += len(embeddings)
        self._held_out.append(self._prepare(sharer_states, receiver_states, embeddings))

    def add(
        self, sharer_states: Sequence[torch.Tensor], receiver_states: Sequence[torch.Tensor], embeddings: torch.Tensor
    ) -> None:
        """Add tokens.

        Args:
            sharer_states: `(num_tokens, heads * head_dim)` per entry: every layer's keys, then every layer's values.
            receiver_states: The same of the receiver.
            embeddings: `(num_tokens, embedding_size)`, the receiver's token embeddings, used where the fuser has them.
        """
        self.num_tokens += len(embeddings)
        self._add_prepared(*self._prepare(sharer_states, receiver_states, embeddings))

    def _add_prepared(
        self, entries: list[torch.Tensor], standardized: torch.Tensor | None, targets: list[torch.Tensor]
    ) -> None:
        num_layers = len(entries) // 2
        blocks = {
            block: torch.cat([entries[block], entries[num_layers + block]], dim=-1)
            for block in self._targets
            if block != _EMBEDDINGS
        }
        if standardized is not None:
            blocks[_EMBEDDINGS] = standardized
        # Products of a few thousand tokens in float32, sums in float64.
        for layer_idx, target in enumerate(targets):
            _add(self._y_sums, layer_idx, target.sum(0))
        for block, layers in self._targets.items():
            _add(self._x_sums, block, blocks[block].sum(0))
            products = blocks[block].T @ torch.cat([targets[layer_idx] for layer_idx in layers], dim=-1)
            widths = [targets[layer_idx].shape[1] for layer_idx in layers]
            for layer_idx, product in zip(layers, products.split(widths, dim=-1), strict=True):
                _add(self._xy, (block, layer_idx), product)
        for first, second in self._pairs:
            _add(self._xx, (first, second), blocks[first].T @ blocks[second])

    def add_over_processes(self) -> None:
        """Add up the sums of all processes, which hold out the same tokens."""
        entries, standardized, targets = self._held_out[0]
        # A process without a batch of its own has no sums yet: those of no token.
        self._add_prepared(
            [entry[:0] for entry in entries],
            None if standardized is None else standardized[:0],
            [target[:0] for target in targets],
        )
        all_sums: list[dict[Any, torch.Tensor]] = [self._x_sums, self._y_sums, self._xx, self._xy]
        for sums in all_sums:
            for key in sorted(sums):
                torch.distributed.all_reduce(sums[key])
        num_tokens = torch.tensor(self.num_tokens, device=targets[0].device)
        torch.distributed.all_reduce(num_tokens)
        self.num_tokens = int(num_tokens)

    def _product(self, first: int, second: int) -> torch.Tensor:
        return self._xx[first, second] if (first, second) in self._xx else self._xx[second, first].T

    def problems(self) -> "Iterator[tuple[list[int], _Problem]]":
        """Yield per group of receiver layers with the same features the layers and their regression."""
        for sources, layers in self._layers.items():
            blocks = self._blocks(sources)
            xx = torch.cat([torch.cat([self._product(first, second) for second in blocks], 1) for first in blocks])
            xy = torch.cat([torch.cat([self._xy[block, layer_idx] for layer_idx in layers], 1) for block in blocks])
            x_mean = torch.cat([self._x_sums[block] for block in blocks]) / self.num_tokens
            y_mean = torch.cat([self._y_sums[layer_idx] for layer_idx in layers]) / self.num_tokens
            held_x = torch.cat([self._fuser.features(x, e, layers[0]) for x, e, _ in self._held_out])
            held_y = torch.cat(
                [torch.cat([y[layer_idx] for layer_idx in layers], dim=-1) for _, _, y in self._held_out]
            )
            problem = _Problem(
                x_mean,
                y_mean,
                xx - self.num_tokens * torch.outer(x_mean, x_mean),
                xy - self.num_tokens * torch.outer(x_mean, y_mean),
                held_x - x_mean.to(held_x),
                held_y - y_mean.to(held_y),
            )
            yield layers, problem


def _add(sums: dict[Key, torch.Tensor], key: Key, part: torch.Tensor) -> None:
    sums[key] = sums[key] + part if key in sums else part.double()


@dataclass
class _Problem:
    """One regression, centred, in float64; the held-out tokens in the fuser's precision."""

    x_mean: torch.Tensor
    y_mean: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor
    held_x: torch.Tensor
    held_y: torch.Tensor


def solve_maps(fuser: MemoryFuser, sums: MapSums, alphas: Sequence[float], progress: bool) -> RidgeReport:
    """Solve for the maps of a fuser and write them into it.

    Args:
        fuser: Overwritten.
        sums: Over tokens.
        alphas: Penalties to choose among, see [`~fitting.ridge.fit_ridge`].
        progress: Show a progress bar.

    Raises:
        ValueError: No penalty is large enough for as few tokens.
    """
    num_layers = len(fuser.receiver_shapes)
    report = RidgeReport(
        sums.num_tokens,
        sums.num_held_out,
        r2_keys=[0.0] * num_layers,
        r2_values=[0.0] * num_layers,
        alphas=[0.0] * num_layers,
        source_layers=fuser.source_layers,
    )
    with tqdm(total=num_layers, desc="Solving", unit="layer", disable=not progress) as bar:
        for layers, problem in sums.problems():
            _solve(fuser, layers, problem, alphas, sums.num_tokens, report)
            bar.update(len(layers))
    return report


def _solve(
    fuser: MemoryFuser,
    layers: Sequence[int],
    problem: _Problem,
    alphas: Sequence[float],
    num_tokens: int,
    report: RidgeReport,
) -> None:
    """Solve for receiver layers with the same features, with the best penalty for each layer."""
    widths = [fuser.receiver_widths[i] + fuser.receiver_widths[len(fuser.receiver_shapes) + i] for i in layers]
    best = [-torch.inf] * len(layers)
    for alpha in alphas:
        penalty = alpha * problem.xx.diagonal().mean() * torch.eye(len(problem.xx)).to(problem.xx)
        factor, failed = torch.linalg.cholesky_ex(problem.xx + penalty)
        if int(failed):
            continue
        columns = zip(layers, problem.xy.split(widths, 1), problem.y_mean.split(widths), strict=True)
        for index, (layer_idx, xy, y_mean) in enumerate(columns):
            memory_map = fuser.maps[layer_idx]
            rank = None if memory_map.rank_proj is None else memory_map.rank_proj.out_features
            down, weight = _maps(factor, xy, rank, num_tokens)
            full = weight if down is None else down @ weight
            truth = problem.held_y.split(widths, 1)[index]
            quality = _explained(truth, problem.held_x @ full.to(truth))
            if float(quality.mean()) <= best[index]:
                continue
            best[index] = float(quality.mean())
            keys, values = quality.split(
                [fuser.receiver_widths[layer_idx], widths[index] - fuser.receiver_widths[layer_idx]]
            )
            report.r2_keys[layer_idx], report.r2_values[layer_idx] = float(keys.mean()), float(values.mean())
            report.alphas[layer_idx] = alpha
            # A rank beyond that of the map leaves the rest of the bottleneck empty.
            memory_map.out_proj.weight.zero_()[:, : len(weight)].copy_(weight.T)
            memory_map.out_proj.bias.copy_(y_mean - problem.x_mean @ full)
            if memory_map.rank_proj is not None and down is not None:
                memory_map.rank_proj.weight.zero_()[: down.shape[1]].copy_(down.T)
    if -torch.inf in best:
        raise ValueError(f"`alphas`: {list(alphas)} are all too small for {num_tokens} tokens; give larger ones.")
    for layer_idx in layers:
        residual = fuser.maps[layer_idx].residual
        if residual is not None:
            residual.down_proj.weight.zero_()


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
