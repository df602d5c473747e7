"""C2C-C (arXiv 2510.03215, section A.1.3): the sharer's states pass a network of their own before the projector."""

import torch
from torch import nn

from ..configuration_c2c import SharerConfig
from .c2c import C2CFuser, Projector
from .grouped_linear import GroupedLinear, WeightSelector


class SharerNetwork(nn.Module):
    """Three linear layers with an exact GELU and dropout between them, one network per entry.

    Args:
        num_entries: Number of entries.
        in_features: Width of the sharer's states.
        out_features: Width of the result.
        sizes: `fuser_hidden_size`, the width in between, and dropout.
    """

    def __init__(self, num_entries: int, in_features: int, out_features: int, sizes: SharerConfig) -> None:
        super().__init__()
        self.in_proj = GroupedLinear(num_entries, in_features, sizes.fuser_hidden_size)
        self.hidden_proj = GroupedLinear(num_entries, sizes.fuser_hidden_size, sizes.fuser_hidden_size)
        self.out_proj = GroupedLinear(num_entries, sizes.fuser_hidden_size, out_features)
        self.dropout = nn.Dropout(sizes.fuser_dropout)

    def forward(self, sharer_states: torch.Tensor, select: WeightSelector) -> torch.Tensor:
        """Map `(num_entries, num_tokens, in_features)` to `(num_entries, num_tokens, out_features)`.

        Args:
            sharer_states: The sharer's states.
            select: Which entries of the weights, in which dtype.
        """
        for layer in (self.in_proj, self.hidden_proj):
            sharer_states = self.dropout(nn.functional.gelu(layer(sharer_states, select)))
        return self.out_proj(sharer_states, select)


class ComplexProjector(Projector):
    """A projector behind a [`SharerNetwork`] that brings the sharer's states to the receiver's width.

    Args:
        num_entries: Number of entries.
        sharer_width: Heads x head_dim of the sharer's states.
        receiver_width: Heads x head_dim of the receiver's states.
        num_heads: The receiver's key/value heads.
        sizes: Width, depth and dropout.
    """

    def __init__(
        self, num_entries: int, sharer_width: int, receiver_width: int, num_heads: int, sizes: SharerConfig
    ) -> None:
        super().__init__(num_entries, receiver_width, receiver_width, num_heads, sizes)
        self.sharer_network = SharerNetwork(num_entries, sharer_width, receiver_width, sizes)

    def forward(
        self,
        sharer_states: torch.Tensor,
        receiver_states: torch.Tensor,
        gate: torch.Tensor | None,
        select: WeightSelector,
    ) -> torch.Tensor:
        """Compute `gate * sigmoid(weight) * projection` as [`Projector`] does from the network's output."""
        return super().forward(self.sharer_network(sharer_states, select), receiver_states, gate, select)


class C2CComplexFuser(C2CFuser):
    """A [`C2CFuser`] of [`ComplexProjector`]s: about as many more weights as the sharer's network has."""

    projector_class = ComplexProjector
