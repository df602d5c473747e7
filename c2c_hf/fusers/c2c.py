"""The trained part: key/value states of receiver and sharer go in, changes of the receiver's states come out.

A sharer's fuser treats every (layer, keys or values) pair, an *entry*, apart, each with its own weights. Entries of
equal shape are stacked, so that all of them run as a few batched matrix products.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ..configuration_c2c import C2CConfig, SharerConfig, layer_mapping
from .grouped_linear import FeedForward, StackedLinear

#: How many bytes of hidden states a processor works on at once: what it can hold near itself. All entries together
#: need as much memory as both models, and a tenth more time for 256 tokens (float32, hidden size 1024, two cores).
PART_BYTES = 8 * 2**20
#: What [`Gate.sample_noise`] may draw.
GATE_NOISES = ("gumbel", "logistic", "none")


class Projector(nn.Module):
    """Feature fusion and dynamic weighting of arXiv 2510.03215 for a stack of entries of equal shape.

    Args:
        num_entries: Number of stacked entries.
        sharer_width: Heads x head_dim of the sharer's states.
        receiver_width: Heads x head_dim of the receiver's states.
        num_heads: The receiver's key/value heads; each gets its own dynamic weight per token.
        sizes: Its width, depth and dropout.
    """

    def __init__(
        self, num_entries: int, sharer_width: int, receiver_width: int, num_heads: int, sizes: SharerConfig
    ) -> None:
        super().__init__()
        hidden_size, intermediate_size = sizes.fuser_hidden_size, sizes.fuser_intermediate_size
        num_layers, dropout = sizes.num_fuser_layers, sizes.fuser_dropout
        self.num_heads = num_heads
        self.in_proj = StackedLinear(num_entries, sharer_width + receiver_width, hidden_size)
        self.shared_ffn = FeedForward(num_entries, hidden_size, intermediate_size, dropout)
        self.weight_ffn = FeedForward(num_entries, hidden_size, hidden_size, dropout)
        self.weight_proj = StackedLinear(num_entries, hidden_size, num_heads)
        self.feature_ffns = nn.Sequential(
            *(FeedForward(num_entries, hidden_size, intermediate_size, dropout) for _ in range(num_layers - 2))
        )
        self.out_proj = StackedLinear(num_entries, hidden_size, receiver_width)

    def forward(
        self, sharer_states: torch.Tensor, receiver_states: torch.Tensor, gate: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute `gate * sigmoid(weight) * projection`.

        Args:
            sharer_states: `(num_entries, num_tokens, sharer_width)`.
            receiver_states: `(num_entries, num_tokens, receiver_width)`.
            gate: `(num_entries, num_tokens, num_heads)`, or `None` where all gates are open.

        Returns:
            The change of the receiver's states, `(num_entries, num_tokens, receiver_width)`.
        """
        hidden_states = self.shared_ffn(self.in_proj(torch.cat([sharer_states, receiver_states], dim=-1)))
        weight = torch.sigmoid(self.weight_proj(self.weight_ffn(hidden_states)))
        projection = self.out_proj(self.feature_ffns(hidden_states))
        if gate is not None:
            weight = weight * gate.to(weight.dtype)
        return (projection.unflatten(-1, (self.num_heads, -1)) * weight.unsqueeze(-1)).flatten(-2)


class Gate(nn.Module):
    """One learned gate per entry: soft and noisy in training, a threshold at 0 afterwards."""

    def __init__(self, num_entries: int) -> None:
        super().__init__()
        #: One of `GATE_NOISES`; the trainer sets it.
        self.gate_noise = "gumbel"
        # Zero is shut: a new fuser changes nothing.
        self.gate_logit = nn.Parameter(torch.zeros(num_entries))
        self._open: tuple[object, list[int]] | None = None

    def sample_noise(self, shape: Sequence[int]) -> torch.Tensor:
        """Draw the noise of training, one draw per entry, token and head.

        `"gumbel"` is `-log(-log u)`, as in arXiv 2510.03215: with it a gate at logit 0, which is shut afterwards, is
        open in 63 % of the draws. `"logistic"` is the difference of two such draws, `log u - log(1 - u)`: open in half
        of them. `"none"` draws nothing.
        """
        if self.gate_noise == "none":
            return torch.zeros(shape, device=self.gate_logit.device)
        uniform = torch.rand(shape, device=self.gate_logit.device, dtype=torch.float32)
        # 0 may be drawn, and has no logarithm.
        uniform = uniform.clamp_min(torch.finfo(torch.float32).tiny)
        if self.gate_noise == "logistic":
            return torch.log(uniform) - torch.log1p(-uniform)
        return -torch.log(-torch.log(uniform))

    def soft(self, num_tokens: int, num_heads: int, temperature: torch.Tensor) -> torch.Tensor:
        """Return `sigmoid((gate_logit + noise) / temperature)`, `(num_entries, num_tokens, num_heads)` in float32."""
        logit = self.gate_logit.float()[:, None, None]
        noise = self.sample_noise((len(self.gate_logit), num_tokens, num_heads))
        return torch.sigmoid((logit + noise) / temperature)

    def open_entries(self) -> list[int]:
        """Return the entries whose gate is open at inference.

        Reading the gates waits for their device, so the answer is kept until they change.
        """
        version = _version(self.gate_logit)
        if self._open is None or self._open[0] != version:
            self._open = (version, torch.nonzero(self.gate_logit > 0).flatten().tolist())
        return self._open[1]


class FuserGroup(nn.Module):
    """The entries of equal shape of one fuser, run as one stack.

    Args:
        entries: Position of each stacked entry in the fuser's list: layers' keys first, then layers' values.
        sharer_width: Heads x head_dim of the sharer's states.
        receiver_width: Heads x head_dim of the receiver's states.
        num_heads: The receiver's key/value heads.
        sizes: The projector's width, depth and dropout.
    """

    def __init__(
        self, entries: Sequence[int], sharer_width: int, receiver_width: int, num_heads: int, sizes: SharerConfig
    ) -> None:
        super().__init__()
        self.entries = list(entries)
        self.projector = Projector(len(self.entries), sharer_width, receiver_width, num_heads, sizes)
        self.gate = Gate(len(self.entries))
        #: Whether training computes hidden states twice rather than keep them.
        self.gradient_checkpointing = False
        self._prepared: tuple[tuple, dict[str, torch.Tensor]] | None = None

    def train(self, mode: bool = True) -> "FuserGroup":
        """Set the mode, and forget what is kept of the weights: fused optimizers change them without a trace."""
        self._prepared, self.gate._open = None, None
        return super().train(mode)

    def active_entries(self) -> list[int]:
        """Return the stacked entries that have an effect now: all of them in training, else those with open gates."""
        return list(range(len(self.entries))) if self.training else self.gate.open_entries()

    def parts(self, num_tokens: int, dtype: torch.dtype) -> list[slice]:
        """Split the active entries into those that run at once: all, but on a processor at inference a few."""
        count, weight = len(self.active_entries()), self.projector.in_proj.weight
        if self.training or weight.device.type != "cpu":
            return [slice(0, count)] if count else []
        size = max(1, PART_BYTES // max(1, num_tokens * weight.shape[1] * dtype.itemsize))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def forward(
        self,
        sharer_states: torch.Tensor,
        receiver_states: torch.Tensor,
        temperature: torch.Tensor,
        part: slice = slice(None),
    ) -> torch.Tensor:
        """Compute the change of the receiver's states for the active entries, or for a part of them.

        Args:
            sharer_states: `(num_entries, num_tokens, sharer_width)`, in the receiver's dtype.
            receiver_states: `(num_entries, num_tokens, receiver_width)`.
            temperature: Scalar, used in training only.
            part: Which of the active entries these are.
        """
        gate = None
        if self.training:
            gate = self.gate.soft(receiver_states.shape[1], self.projector.num_heads, temperature)
        call = (self.projector, self._weights(receiver_states.dtype, part), (sharer_states, receiver_states, gate))
        if self.training and self.gradient_checkpointing:
            return checkpoint(functional_call, *call, use_reentrant=False)
        return functional_call(*call)

    def _weights(self, dtype: torch.dtype, part: slice) -> dict[str, torch.Tensor]:
        """Return a part of the active entries' weights in the dtype that the states have."""
        parameters: dict[str, torch.Tensor] = dict(self.projector.named_parameters())
        if self.training or torch.is_grad_enabled():
            # Autocast, where it is on, casts by itself and keeps its copies.
            device_type = self.gate.gate_logit.device.type
            casts = torch.is_autocast_enabled(device_type)
            active = None if self.training else self.active_entries()[part]
            return {
                name: (value if active is None else value[active]).to(value.dtype if casts else dtype)
                for name, value in parameters.items()
            }
        active = self.active_entries()
        if len(active) == len(self.entries) and all(value.dtype == dtype for value in parameters.values()):
            return {name: value[part] for name, value in parameters.items()}
        key = (dtype, tuple(active), *map(_version, parameters.values()))
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = (key, {name: value[active].to(dtype) for name, value in parameters.items()})
        return {name: value[part] for name, value in self._prepared[1].items()}


class C2CFuser(nn.Module):
    """Projects one sharer's key/value states into the receiver's, for all layers at once.

    Args:
        config: Receiver layer shapes, layer alignment, initialization and gate temperature.
        sharer: Sharer layer shapes and sizes.
    """

    gate_temperature: torch.Tensor

    def __init__(
        self,
        config: C2CConfig,
        sharer: SharerConfig,
    ) -> None:
        super().__init__()
        receiver_shapes, sharer_shapes = config.receiver_layer_shapes, sharer.layer_shapes
        mapping = layer_mapping(len(receiver_shapes), len(sharer_shapes), config.layer_alignment)
        self.num_layers = len(receiver_shapes)
        #: Which of the sharer's entries each entry reads: layers' keys first, then layers' values.
        self.sources = [*mapping, *(len(sharer_shapes) + layer_idx for layer_idx in mapping)]
        receiver_widths, sharer_widths = _widths(receiver_shapes), _widths(sharer_shapes)
        groups: dict[tuple[int, int, int], list[int]] = {}
        for entry, source in enumerate(self.sources):
            num_heads = receiver_shapes[entry % self.num_layers][0]
            groups.setdefault((sharer_widths[source], receiver_widths[entry], num_heads), []).append(entry)
        self.groups: Any = nn.ModuleList(FuserGroup(entries, *shape, sharer) for shape, entries in groups.items())
        if config.fuser_initialization == "zero_output":
            self._start_open()
        self.register_buffer("gate_temperature", torch.tensor(float(config.initial_gate_temperature)))

    def forward(
        self,
        sharer_states: Sequence[torch.Tensor],
        receiver_states: Sequence[torch.Tensor],
        take: Callable[[int, torch.Tensor], None] | None = None,
    ) -> list[torch.Tensor | None]:
        """Compute how the receiver's states change.

        Entries are read when they are worked on, and given to `take` before others are, so that states need to be
        there for a few entries at a time only.

        Args:
            sharer_states: The sharer's states at the aligned positions, one tensor `(num_tokens, heads * head_dim)`
                per entry: every layer's keys, then every layer's values.
            receiver_states: The receiver's states at the same tokens, likewise.
            take: Called with the index of each receiver entry that changes and the change. `None`: they are returned.

        Returns:
            One change per receiver entry, of its shape and dtype; `None` where the gate is shut, or `take` has it.
        """
        changes: list[torch.Tensor | None] = [None] * len(receiver_states)
        take = changes.__setitem__ if take is None else take
        first = receiver_states[0]
        for group in self.groups:
            active = [group.entries[i] for i in group.active_entries()]
            for part in group.parts(len(first), first.dtype):
                entries = active[part]
                receiver = torch.stack([receiver_states[entry] for entry in entries])
                sharer = torch.stack([sharer_states[self.sources[entry]] for entry in entries]).to(receiver)
                change = group(sharer, receiver, self.gate_temperature, part).to(receiver.dtype)
                for entry, entry_change in zip(entries, change.unbind(0), strict=True):
                    take(entry, entry_change)
        return changes

    def _start_open(self) -> None:
        """Open all gates in front of output layers that are zero: a new fuser changes nothing all the same."""
        for group in self.groups:
            nn.init.ones_(group.gate.gate_logit)
            for parameter in group.projector.out_proj.parameters():
                nn.init.zeros_(parameter)

    def is_open(self) -> bool:
        """Say whether the fuser can change anything now."""
        return any(group.active_entries() for group in self.groups)

    def locate(self, entry: int) -> tuple[FuserGroup, int]:
        """Return the group and the index in its stack that hold an entry."""
        for group in self.groups:
            if entry in group.entries:
                return group, group.entries.index(entry)
        raise IndexError(f"`entry` must be below {2 * self.num_layers}, but got {entry}.")


def _version(parameter: torch.Tensor) -> object:
    """Return what changes when a parameter is moved or written to; of inference tensors nothing tells."""
    return object() if parameter.is_inference() else (parameter.data_ptr(), parameter._version)


def _widths(shapes: Sequence[Sequence[int]]) -> list[int]:
    keys = [heads * key_dim for heads, key_dim, _ in shapes]
    values = [heads * value_dim for heads, _, value_dim in shapes]
    return keys + values
