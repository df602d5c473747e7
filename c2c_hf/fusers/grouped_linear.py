"""Layers of which each entry of a group has its own weights, run as batched matrix products."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import nn

#: Maps a parameter of a whole group to the tensor to compute with: of some entries, in the dtype of the states.
WeightSelector: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def whole_weight(parameter: torch.Tensor) -> torch.Tensor:
    """Select a parameter as it is."""
    return parameter


def select_entries(
    parameter: torch.Tensor, entries: slice | list[int] = slice(None), dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Select some entries of a parameter, cast to `dtype` unless it is `None`; gradients flow back to it."""
    selected = parameter[entries]
    return selected if dtype is None else selected.to(dtype)


def select_from_copies(parameter: torch.Tensor, copies: Mapping[int, torch.Tensor], entries: slice) -> torch.Tensor:
    """Select some entries of a parameter's copy in another dtype, by the identity of the parameter."""
    return copies[id(parameter)][entries]


class GroupedLinear(nn.Module):
    """One linear layer per entry, `(num_entries, num_tokens, in)` to `(num_entries, num_tokens, out)`."""

    def __init__(self, num_entries: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_entries, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_entries, out_features)) if bias else None
        # The bounds of `nn.Linear`, whose own initialization would take the group for a convolution.
        bound = in_features**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        hidden_states: torch.Tensor,
        select: WeightSelector = whole_weight,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply each entry's layer to its tokens.

        Args:
            hidden_states: `(num_entries, num_tokens, in)`.
            select: Which entries of the weights, in which dtype.
            residual: `(num_entries, num_tokens, out)`, added to the output of a layer without bias; `None`: nothing.
        """
        weight = select(self.weight).transpose(1, 2)
        added = residual if self.bias is None else select(self.bias).unsqueeze(1)
        return torch.bmm(hidden_states, weight) if added is None else torch.baddbmm(added, hidden_states, weight)


class GroupedRMSNorm(nn.Module):
    """One RMSNorm per entry, its mean computed in float32."""

    def __init__(self, num_entries: int, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_entries, hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor, select: WeightSelector = whole_weight) -> torch.Tensor:
        """Normalize `(num_entries, num_tokens, hidden_size)` over its last dimension."""
        weight, needs_grad = select(self.weight).unsqueeze(1), torch.is_grad_enabled()
        if needs_grad or hidden_states.device.type != "cpu" or hidden_states.dtype.itemsize > 2:
            normed = nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        else:
            # PyTorch has no fused kernel for half precision on the CPU and makes eight passes over the states.
            norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
            scale = torch.rsqrt(norm.square() / hidden_states.shape[-1] + self.eps)
            normed = hidden_states * scale.to(hidden_states.dtype)
        # Autograd needs the tensor that the in-place product would overwrite.
        return normed * weight if needs_grad else normed.mul_(weight)


class GroupedFeedForward(nn.Module):
    """`x + dropout(W_2 gelu(W_1 norm(x)))`, bias-free, one per entry."""

    def __init__(self, num_entries: int, hidden_size: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = GroupedRMSNorm(num_entries, hidden_size)
        self.up_proj = GroupedLinear(num_entries, hidden_size, intermediate_size, bias=False)
        self.down_proj = GroupedLinear(num_entries, intermediate_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor, select: WeightSelector = whole_weight) -> torch.Tensor:
        """Map `(num_entries, num_tokens, hidden_size)` to the same shape."""
        activated = nn.functional.gelu(self.up_proj(self.norm(hidden_states, select), select))
        if self.training and self.dropout.p > 0:
            return hidden_states + self.dropout(self.down_proj(activated, select))
        # Adding within the product saves a pass over the states.
        return self.down_proj(activated, select, residual=hidden_states)
