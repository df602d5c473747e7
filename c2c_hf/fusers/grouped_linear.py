"""Layers of which each entry of a stack has its own, run as batched matrix products."""

import torch
from torch import nn


class StackedLinear(nn.Module):
    """One linear layer per entry, `(num_entries, num_tokens, in)` to `(num_entries, num_tokens, out)`."""

    def __init__(self, num_entries: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_entries, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_entries, out_features)) if bias else None
        # The bounds of `nn.Linear`, whose own initialisation would read the stack as a convolution.
        bound = in_features**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, hidden_states: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """Apply each entry's layer to its tokens, and add the bias or, without one, `added`."""
        added = self.bias.unsqueeze(1) if self.bias is not None else added
        if added is None:
            return torch.bmm(hidden_states, self.weight.transpose(1, 2))
        return torch.baddbmm(added, hidden_states, self.weight.transpose(1, 2))


class StackedRMSNorm(nn.Module):
    """One RMSNorm per entry, its mean computed in float32."""

    def __init__(self, num_entries: int, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_entries, hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise `(num_entries, num_tokens, hidden_size)` over its last dimension."""
        weight, learns = self.weight.unsqueeze(1), torch.is_grad_enabled()
        if learns or hidden_states.device.type != "cpu" or hidden_states.dtype.itemsize > 2:
            normed = nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
        else:
            # PyTorch has no kernel for it there, and goes over half-precision states eight times.
            norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=torch.float32)
            scale = torch.rsqrt(norm.square() / hidden_states.shape[-1] + self.eps)
            normed = hidden_states * scale.to(hidden_states.dtype)
        # Autograd would want what is overwritten.
        return normed * weight if learns else normed.mul_(weight)


class FeedForward(nn.Module):
    """`x + dropout(W_2 gelu(W_1 norm(x)))`, bias-free, one per entry."""

    def __init__(self, num_entries: int, hidden_size: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = StackedRMSNorm(num_entries, hidden_size)
        self.up_proj = StackedLinear(num_entries, hidden_size, intermediate_size, bias=False)
        self.down_proj = StackedLinear(num_entries, intermediate_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(num_entries, num_tokens, hidden_size)` to the same shape."""
        activated = nn.functional.gelu(self.up_proj(self.norm(hidden_states)))
        if self.training and self.dropout.p > 0:
            return hidden_states + self.dropout(self.down_proj(activated))
        # The sum within the product saves a pass over the states.
        return self.down_proj(activated, hidden_states)
