"""The fuser of memory mode: maps a sharer's key/value states of a context to the receiver's."""

from collections.abc import Sequence

import torch
from torch import nn

from ..configuration_c2c import C2CConfig, SharerConfig, layer_mapping
from .grouped_linear import GroupedLinear, GroupedRMSNorm


def source_layers(num_receiver_layers: int, num_sharer_layers: int, count: int) -> list[list[int]]:
    """Return the source layers of each receiver layer: `count` neighbours around its relative depth."""
    count = min(count, num_sharer_layers)
    centers = layer_mapping(num_receiver_layers, num_sharer_layers, "depth_normalized")
    starts = [min(max(0, center - count // 2), num_sharer_layers - count) for center in centers]
    return [list(range(start, start + count)) for start in starts]


class MemoryGroup(nn.Module):
    """Receiver layers of equal shapes, whose maps run as one group.

    Each map is affine, of full rank or through a bottleneck of `rank`, plus an optional residual
    network that starts at zero, so that training starts from the map as fitted in closed form.

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
        self.down_proj = None if rank is None else GroupedLinear(count, in_features, rank, bias=False)
        self.out_proj = GroupedLinear(count, width, out_features)
        self.residual = None
        if hidden_size:
            first, last = GroupedLinear(count, width, hidden_size), GroupedLinear(count, hidden_size, out_features)
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            self.residual = nn.Sequential(GroupedRMSNorm(count, width), first, nn.GELU(), last)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(num_layers, num_tokens, in_features)` to `(num_layers, num_tokens, out_features)`."""
        hidden_states = features if self.down_proj is None else self.down_proj(features)
        states = self.out_proj(hidden_states)
        return states if self.residual is None else states + self.residual(hidden_states)


class MemoryFuser(nn.Module):
    """Maps one sharer's states of a context to the receiver's, layer by layer.

    Args:
        config: Receiver layer shapes, `memory_source_layers`, `memory_rank`, `memory_shared_bottleneck` and
            `memory_hidden_size`.
        sharer: Sharer layer shapes.

    The buffers `sharer_scales` and `receiver_scales` hold the standard deviation of the states, rounded to a power of
    two, every layer's keys, then every layer's values: the maps work on states of about unit size, so that one penalty
    and one learning rate suit all.
    """

    sharer_scales: torch.Tensor
    receiver_scales: torch.Tensor

    def __init__(self, config: C2CConfig, sharer: SharerConfig) -> None:
        super().__init__()
        receiver_shapes, sharer_shapes = config.receiver_layer_shapes or [], sharer.layer_shapes or []
        #: (num_key_value_heads, key head_dim, value head_dim) of every receiver layer.
        self.receiver_shapes = [(int(heads), int(key), int(value)) for heads, key, value in receiver_shapes]
        #: Heads x head_dim of every sharer layer's keys, then of every layer's values.
        self.entry_widths = [int(shape[0] * shape[i]) for i in (1, 2) for shape in sharer_shapes]
        shared = config.memory_shared_bottleneck
        count = len(sharer_shapes) if shared else config.memory_source_layers
        #: The source layers of each receiver layer.
        self.sources = source_layers(len(receiver_shapes), len(sharer_shapes), count)
        self.register_buffer("sharer_scales", torch.ones(2 * len(sharer_shapes)))
        self.register_buffer("receiver_scales", torch.ones(2 * len(receiver_shapes)))
        rank, hidden_size = config.memory_rank, config.memory_hidden_size
        self.down_proj = None
        if shared and rank is not None:
            self.down_proj = nn.Linear(sum(self.entry_widths), rank, bias=False)
        groups: dict[tuple[int, int], list[int]] = {}
        for layer_idx, (heads, key_dim, value_dim) in enumerate(self.receiver_shapes):
            width = sum(self.entry_widths[entry] for entry in self.entries(layer_idx))
            width = width if self.down_proj is None else self.down_proj.out_features
            groups.setdefault((width, heads * (key_dim + value_dim)), []).append(layer_idx)
        own_rank = None if shared else rank
        self.groups: Sequence[MemoryGroup] = nn.ModuleList(  # type: ignore[assignment]
            MemoryGroup(layers, *shape, own_rank, hidden_size) for shape, layers in groups.items()
        )

    def features(self, sharer_states: Sequence[torch.Tensor], layer_idx: int) -> torch.Tensor:
        """Return the input features of a receiver layer, or of the bottleneck that all layers share.

        Args:
            sharer_states: `(num_tokens, heads * head_dim)` per entry: every layer's keys, free of position, then every
                layer's values.
            layer_idx: The receiver layer.

        Returns:
            `(num_tokens, in_features)`.
        """
        entries, scales = self.entries(layer_idx), self.sharer_scales
        sizes = torch.cat([scales[i].expand(self.entry_widths[i]) for i in entries])
        # In place: with all layers of a sharer this is the largest tensor.
        return torch.cat([sharer_states[i].to(scales.dtype) for i in entries], dim=-1).div_(sizes)

    def entries(self, layer_idx: int) -> list[int]:
        """Return the sharer's entries that make up the features of a receiver layer, in order."""
        num_layers = len(self.sharer_scales) // 2
        return [i for source in self.sources[layer_idx] for i in (source, num_layers + source)]

    def bottleneck(self, layer_idx: int) -> int | None:
        """Return the rank of a receiver layer's map, `None` for a full one."""
        if self.down_proj is not None:
            return self.down_proj.out_features
        group = next(group for group in self.groups if layer_idx in group.layers)
        return None if group.down_proj is None else group.down_proj.weight.shape[1]

    def forward(self, sharer_states: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Map a sharer's states of a context to the receiver's.

        Args:
            sharer_states: As in [`MemoryFuser.features`].

        Returns:
            Per receiver layer its keys, free of position, and values: `(num_tokens, num_key_value_heads, head_dim)`.
        """
        num_layers = len(self.receiver_shapes)
        states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        shared = None if self.down_proj is None else self.down_proj(self.features(sharer_states, 0))
        for group in self.groups:
            common = shared
            if common is None and all(self.sources[i] == self.sources[group.layers[0]] for i in group.layers):
                common = self.features(sharer_states, group.layers[0])
            if common is None:
                features = torch.stack([self.features(sharer_states, layer_idx) for layer_idx in group.layers])
            else:
                features = common.expand(len(group.layers), *common.shape)
            mapped = group(features)
            # Powers of two, which every dtype represents exactly.
            scaled = mapped * self._sizes(group).to(mapped)
            for layer_idx, own in zip(group.layers, scaled.unbind(0), strict=True):
                heads, key_dim, value_dim = self.receiver_shapes[layer_idx]
                keys, values = own.split([heads * key_dim, heads * value_dim], dim=-1)
                states[layer_idx] = (keys.unflatten(-1, (heads, key_dim)), values.unflatten(-1, (heads, value_dim)))
        return [states[layer_idx] for layer_idx in range(num_layers)]

    def _sizes(self, group: MemoryGroup) -> torch.Tensor:
        """Return `receiver_scales` of a group's outputs, `(num_layers, 1, out_features)`."""
        rows = []
        for layer_idx in group.layers:
            heads, *dims = self.receiver_shapes[layer_idx]
            sizes = self.receiver_scales[layer_idx :: len(self.receiver_shapes)]
            rows.append(torch.cat([size.expand(heads * dim) for size, dim in zip(sizes, dims, strict=True)]))
        return torch.stack(rows).unsqueeze(1)
