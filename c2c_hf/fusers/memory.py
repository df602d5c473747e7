"""The fuser of memory mode: maps a sharer's key/value states of a context to the receiver's."""

from collections.abc import Sequence

import torch
from torch import nn

from ..configuration_c2c import C2CConfig, LayerShape, SharerConfig, several_source_layers


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, bias-free; its output starts at zero."""

    def __init__(self, in_features: int, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_features, hidden_size, bias=False)
        self.up_proj = nn.Linear(in_features, hidden_size, bias=False)
        self.down_proj = nn.Linear(hidden_size, out_features, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(num_tokens, in_features)` to `(num_tokens, out_features)`."""
        return self.down_proj(nn.functional.silu(self.gate_proj(features)) * self.up_proj(features))


class MemoryMap(nn.Module):
    """Map of one receiver layer: affine, with an optional residual network that starts at zero.

    Training so begins at the affine map as it is fitted in closed form.

    Args:
        in_features: Width of a token's features.
        out_features: Width of the layer's keys and values together.
        rank: Width of the affine map's bottleneck; `None`: full rank.
        hidden_size: Width of the residual network; 0: none.
    """

    def __init__(self, in_features: int, out_features: int, rank: int | None, hidden_size: int) -> None:
        super().__init__()
        self.rank_proj = None if rank is None else nn.Linear(in_features, rank, bias=False)
        self.out_proj = nn.Linear(in_features if rank is None else rank, out_features)
        self.residual = SwiGLU(in_features, hidden_size, out_features) if hidden_size else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `(num_tokens, in_features)` to `(num_tokens, out_features)`."""
        states = self.out_proj(features if self.rank_proj is None else self.rank_proj(features))
        return states if self.residual is None else states + self.residual(features)


class MemoryFuser(nn.Module):
    """Maps one sharer's states of a context to the receiver's, layer by layer.

    Args:
        config: Receiver layer shapes, and the `memory_...` fields.
        sharer: Sharer layer shapes and `memory_source_layers`.

    Features and results are standardized per dimension, so that one penalty and one learning rate suit all layers: the
    buffers `sharer_mean` and `sharer_scale` hold mean and standard deviation of every layer's keys, then every layer's
    values, side by side; `receiver_...` likewise, and `embedding_...` those of the receiver's token embeddings. Keys
    are free of rotary position.

    Raises:
        ValueError: `memory_source_layers` of the sharer names layers that it does not have, or does not hold one entry
            per receiver layer.
    """

    sharer_mean: torch.Tensor
    sharer_scale: torch.Tensor
    receiver_mean: torch.Tensor
    receiver_scale: torch.Tensor
    embedding_mean: torch.Tensor
    embedding_scale: torch.Tensor

    def __init__(self, config: C2CConfig, sharer: SharerConfig) -> None:
        super().__init__()
        receiver_shapes, sharer_shapes = config.receiver_layer_shapes or [], sharer.layer_shapes or []
        #: (num_key_value_heads, key head_dim, value head_dim) of every receiver layer.
        self.receiver_shapes: list[LayerShape] = [(int(h), int(k), int(v)) for h, k, v in receiver_shapes]
        #: Heads x head_dim of every layer's keys, then of every layer's values.
        self.sharer_widths = [int(shape[0] * shape[i]) for i in (1, 2) for shape in sharer_shapes]
        self.receiver_widths = [shape[0] * shape[i] for i in (1, 2) for shape in self.receiver_shapes]
        #: Number of the receiver's token embeddings per slot: its own token's, and those of the tokens before it.
        self.num_token_embeddings = config.memory_token_embeddings if config.memory_grid == "receiver" else 0
        #: Width of these embeddings together.
        self.embedding_size = self.num_token_embeddings * (config.receiver_embedding_size or 0)
        for name, width in (
            ("sharer", sum(self.sharer_widths)),
            ("receiver", sum(self.receiver_widths)),
            ("embedding", self.embedding_size),
        ):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(width))
        #: The source layers of each receiver layer.
        self.source_layers = several_source_layers(
            "memory_source_layers",
            sharer.memory_source_layers,
            len(self.receiver_shapes),
            len(sharer_shapes),
            config.memory_source_layers,
        )
        self.maps: Sequence[MemoryMap] = nn.ModuleList(  # type: ignore[assignment]
            MemoryMap(
                sum(self.sharer_widths[entry] for entry in self.entries(layer_idx)) + self.embedding_size,
                heads * (key_dim + value_dim),
                config.memory_rank,
                config.memory_hidden_size,
            )
            for layer_idx, (heads, key_dim, value_dim) in enumerate(self.receiver_shapes)
        )

    def entries(self, layer_idx: int) -> list[int]:
        """Return which of the sharer's entries are the features of a receiver layer, in order."""
        num_layers = len(self.sharer_widths) // 2
        return [entry for source in self.source_layers[layer_idx] for entry in (source, num_layers + source)]

    def standardize(
        self, sharer_states: Sequence[torch.Tensor], token_embeddings: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Bring features to mean 0 and scale 1.

        Args:
            sharer_states: As in [`MemoryFuser.forward`].
            token_embeddings: As there.

        Returns:
            The same, in the precision of the fuser.

        Raises:
            ValueError: `token_embeddings` is missing.
        """
        dtype = self.sharer_mean.dtype
        means, scales = self.sharer_mean.split(self.sharer_widths), self.sharer_scale.split(self.sharer_widths)
        states = [
            (own.to(dtype) - mean) / scale for own, mean, scale in zip(sharer_states, means, scales, strict=True)
        ]
        if not self.num_token_embeddings:
            return states, None
        if token_embeddings is None:
            raise ValueError("`token_embeddings` must be given to a fuser with `memory_token_embeddings`.")
        return states, (token_embeddings.to(dtype) - self.embedding_mean) / self.embedding_scale

    def features(
        self, sharer_states: Sequence[torch.Tensor], token_embeddings: torch.Tensor | None, layer_idx: int
    ) -> torch.Tensor:
        """Put the features of a receiver layer side by side.

        Args:
            sharer_states: From [`MemoryFuser.standardize`].
            token_embeddings: From there as well.
            layer_idx: The receiver layer.

        Returns:
            `(num_tokens, in_features)`.
        """
        parts = [sharer_states[entry] for entry in self.entries(layer_idx)]
        return torch.cat(parts if token_embeddings is None else [*parts, token_embeddings], dim=-1)

    def forward(
        self, sharer_states: Sequence[torch.Tensor], token_embeddings: torch.Tensor | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Map a sharer's states of a context to the receiver's.

        Args:
            sharer_states: `(num_tokens, heads * head_dim)` per entry: every layer's keys, free of rotary position,
                then every layer's values; one row per slot.
            token_embeddings: `(num_tokens, embedding_size)`, the receiver's embeddings of each slot's token and of
                those before it, see [`~inference.memory_slots.slot_embeddings`]; `None` for a fuser without them.

        Returns:
            Per receiver layer its keys, free of rotary position, and values:
            `(num_tokens, num_key_value_heads, head_dim)`.
        """
        entries, embeddings = self.standardize(sharer_states, token_embeddings)
        num_layers = len(self.receiver_shapes)
        means, scales = (buffer.split(self.receiver_widths) for buffer in (self.receiver_mean, self.receiver_scale))
        states = []
        for layer_idx, (heads, _, _) in enumerate(self.receiver_shapes):
            mapped = self.maps[layer_idx](self.features(entries, embeddings, layer_idx))
            own = (layer_idx, num_layers + layer_idx)
            halves = mapped.split([self.receiver_widths[entry] for entry in own], dim=-1)
            keys, values = (
                (half * scales[entry] + means[entry]).unflatten(-1, (heads, -1))
                for half, entry in zip(halves, own, strict=True)
            )
            states.append((keys, values))
        return states
