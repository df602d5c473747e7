"""The fuser of memory mode: a sharer's states of a context become key/value states that the receiver attends to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .configuration_c2c import C2CConfig, LayerShape, layer_mapping
from .fuser import StackedLinear, StackedRMSNorm


def source_layers(num_receiver_layers: int, num_sharer_layers: int, count: int) -> list[list[int]]:
    """Say which sharer layers each receiver layer is made from: `count` neighbours around its relative depth."""
    count = min(count, num_sharer_layers)
    centres = layer_mapping(num_receiver_layers, num_sharer_layers, "depth_normalized")
    starts = [min(max(0, centre - count // 2), num_sharer_layers - count) for centre in centres]
    return [list(range(start, start + count)) for start in starts]


class MemoryGroup(nn.Module):
    """Receiver layers of equal shapes, whose maps run as one stack.

    Each map is affine, of full rank or through a bottleneck of `rank`, with an optional residual network beside it
    that starts at zero, so that a map fitted in closed form is where training begins.

    Args:
        layers: The receiver layers.
        in_features: Width of a token's features: keys and values of all source layers.
        out_features: Width of the receiver's keys and values together.
        rank: Width of the bottleneck, or `None`.
        hidden_size: Width of the residual network; 0: none.
    """

    def __init__(
        self, layers: Sequence[int], in_features: int, out_features: int, rank: int | None, hidden_size: int
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        count, width = len(self.layers), in_features if rank is None else rank
        self.down_proj = None if rank is None else StackedLinear(count, in_features, rank, bias=False)
        self.out_proj = StackedLinear(count, width, out_features)
        self.residual = None
        if hidden_size:
            first, last = StackedLinear(count, width, hidden_size), StackedLinear(count, hidden_size, out_features)
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            self.residual = nn.Sequential(StackedRMSNorm(count, width), first, nn.GELU(), last)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(num_layers, num_tokens, in_features)` to `(num_layers, num_tokens, out_features)`."""
        hidden_states = features if self.down_proj is None else self.down_proj(features)
        states = self.out_proj(hidden_states)
        return states if self.residual is None else states + self.residual(hidden_states)


class MemoryFuser(nn.Module):
    """Maps one sharer's states of a context to the receiver's, layer by layer.

    Args:
        receiver_shapes: Shape of every cached receiver layer.
        sharer_shapes: Shape of every cached sharer layer.
        config: `memory_source_layers`, `memory_rank` and `memory_hidden_size`.
    """

    def __init__(
        self, receiver_shapes: Sequence[LayerShape], sharer_shapes: Sequence[LayerShape], config: C2CConfig
    ) -> None:
        super().__init__()
        #: (num_key_value_heads, key head_dim, value head_dim) of every receiver layer.
        self.receiver_shapes = [(int(heads), int(key), int(value)) for heads, key, value in receiver_shapes]
        #: The sharer layers that each receiver layer is made from.
        self.sources = source_layers(len(receiver_shapes), len(sharer_shapes), config.memory_source_layers)
        groups: dict[tuple[int, int], list[int]] = {}
        for layer_idx, (heads, key_dim, value_dim) in enumerate(self.receiver_shapes):
            in_features = sum(sharer_shapes[i][0] * sum(sharer_shapes[i][1:]) for i in self.sources[layer_idx])
            groups.setdefault((in_features, heads * (key_dim + value_dim)), []).append(layer_idx)
        rank, hidden_size = config.memory_rank, config.memory_hidden_size
        self.groups: Any = nn.ModuleList(
            MemoryGroup(layers, *shape, rank, hidden_size) for shape, layers in groups.items()
        )

    def features(self, sharer_states: Sequence[torch.Tensor], layer_idx: int) -> torch.Tensor:
        """Return what a receiver layer is made from.

        Args:
            sharer_states: `(num_tokens, heads * head_dim)` per entry: every layer's keys, free of position, then every
                layer's values.
            layer_idx: The receiver layer.

        Returns:
            `(num_tokens, in_features)`.
        """
        num_layers, sources = len(sharer_states) // 2, self.sources[layer_idx]
        return torch.cat([sharer_states[i] for s in sources for i in (s, num_layers + s)], dim=-1)

    def forward(self, sharer_states: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Make the receiver's states of a context.

        Args:
            sharer_states: As in [`MemoryFuser.features`].

        Returns:
            Per receiver layer its keys, free of position, and values: `(num_tokens, num_key_value_heads, head_dim)`.
        """
        states: list[Any] = [None] * len(self.receiver_shapes)
        for group in self.groups:
            dtype = group.out_proj.weight.dtype
            features = torch.stack([self.features(sharer_states, layer_idx) for layer_idx in group.layers])
            for layer_idx, made in zip(group.layers, group(features.to(dtype)).unbind(0), strict=True):
                heads, key_dim, value_dim = self.receiver_shapes[layer_idx]
                keys, values = made.split([heads * key_dim, heads * value_dim], dim=-1)
                states[layer_idx] = (keys.unflatten(-1, (heads, key_dim)), values.unflatten(-1, (heads, value_dim)))
        return states
