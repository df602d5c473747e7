"""The projector of Cache-to-Cache (arXiv 2510.03215): key/value states in, changes of the receiver's states out.

A sharer's fuser has one *entry* per receiver layer and kind of state: every layer's keys, then every layer's values,
each with its own weights. Entries of equal shape form a group and run as a few batched matrix products.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..configuration_c2c import C2CConfig, SharerConfig, layer_mapping, several_source_layers
from .grouped_linear import GroupedFeedForward, GroupedLinear, WeightSelector, select_entries, select_from_copies

#: How many bytes of hidden states the CPU computes at once, so that they stay in its caches. All entries at once take
#: as much memory as both models, and 10 % more time for 256 tokens (float32, hidden size 1024, two cores).
PART_BYTES = 8 * 2**20
#: What [`Gate.sample_noise`] may draw.
GATE_NOISES = ("gumbel", "logistic", "none")


class Projector(nn.Module):
    """Feature fusion and dynamic weighting (arXiv 2510.03215, section 3.3) for a group of entries of equal shape.

    Args:
        num_entries: Number of entries.
        sharer_width: Heads x head_dim of the sharer's states.
        receiver_width: Heads x head_dim of the receiver's states.
        num_heads: The receiver's key/value heads; each gets its own dynamic weight per token.
        sizes: Width, depth and dropout.
    """

    def __init__(
        self, num_entries: int, sharer_width: int, receiver_width: int, num_heads: int, sizes: SharerConfig
    ) -> None:
        super().__init__()
        hidden_size, intermediate_size = sizes.fuser_hidden_size, sizes.fuser_intermediate_size
        dropout = sizes.fuser_dropout
        self.num_heads = num_heads
        self.in_proj = GroupedLinear(num_entries, sharer_width + receiver_width, hidden_size)
        self.shared_ffn = GroupedFeedForward(num_entries, hidden_size, intermediate_size, dropout)
        self.weight_ffn = GroupedFeedForward(num_entries, hidden_size, hidden_size, dropout)
        self.weight_proj = GroupedLinear(num_entries, hidden_size, num_heads)
        self.feature_ffns = nn.ModuleList(
            GroupedFeedForward(num_entries, hidden_size, intermediate_size, dropout)
            for _ in range(sizes.num_fuser_layers - 2)
        )
        self.out_proj = GroupedLinear(num_entries, hidden_size, receiver_width)

    def forward(
        self,
        sharer_states: torch.Tensor,
        receiver_states: torch.Tensor,
        gate: torch.Tensor | None,
        select: WeightSelector,
    ) -> torch.Tensor:
        """Compute `gate * sigmoid(weight) * projection`.

        Args:
            sharer_states: `(num_entries, num_tokens, sharer_width)`.
            receiver_states: `(num_entries, num_tokens, receiver_width)`.
            gate: `(num_entries, num_tokens, num_heads)`, or `None` where all gates are open.
            select: Which entries of the weights, in which dtype.

        Returns:
            The change of the receiver's states, `(num_entries, num_tokens, receiver_width)`.
        """
        hidden_states = self.in_proj(torch.cat([sharer_states, receiver_states], dim=-1), select)
        hidden_states = self.shared_ffn(hidden_states, select)
        weight = torch.sigmoid(self.weight_proj(self.weight_ffn(hidden_states, select), select))
        for feature_ffn in self.feature_ffns:
            hidden_states = feature_ffn(hidden_states, select)
        projection = self.out_proj(hidden_states, select)
        if gate is not None:
            weight = weight * gate.to(weight.dtype)
        return (projection.unflatten(-1, (self.num_heads, -1)) * weight.unsqueeze(-1)).flatten(-2)


class Gate(nn.Module):
    """One learned gate per entry: a relaxed Bernoulli sample in training, open where `gate_logit > 0` at inference."""

    def __init__(self, num_entries: int) -> None:
        super().__init__()
        #: One of `GATE_NOISES`; the trainer sets it.
        self.gate_noise = "gumbel"
        # Zero is closed: a new fuser changes nothing.
        self.gate_logit = nn.Parameter(torch.zeros(num_entries))
        self._open: tuple[object, list[int]] | None = None

    def sample_noise(self, shape: Sequence[int]) -> torch.Tensor:
        """Draw the noise of training, one draw per entry, token and head.

        `"gumbel"` is `-log(-log u)`, as in arXiv 2510.03215: with it a gate at logit 0, which is closed at inference,
        is open in 63 % of the draws. `"logistic"` is the difference of two such draws, `log u - log(1 - u)`: open in
        half of them. `"none"` is zero.
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
        """Return `sigmoid((gate_logit + noise) / temperature)`, `(num_entries, num_tokens, num_heads)` in float32.

        Args:
            num_tokens: Number of fused tokens.
            num_heads: The receiver's key/value heads.
            temperature: Scalar.
        """
        logit = self.gate_logit.float()[:, None, None]
        if not self.gate_logit.requires_grad:
            # A frozen gate is as at inference.
            return (logit > 0).float().expand(-1, num_tokens, num_heads)
        noise = self.sample_noise((len(self.gate_logit), num_tokens, num_heads))
        return torch.sigmoid((logit + noise) / temperature)

    def open_entries(self) -> list[int]:
        """Return the entries whose gate is open at inference.

        Copying the gates to the host synchronizes their device, so the answer is kept until they change.
        """
        version = _version(self.gate_logit)
        kept = self._open
        if kept is None or kept[0] != version:
            kept = (version, torch.nonzero(self.gate_logit > 0).flatten().tolist())
            self._open = kept
        return kept[1]


class FuserGroup(nn.Module):
    """The entries of equal shape of one fuser.

    Args:
        entries: Index of each entry of the group in the fuser's list: every layer's keys, then every layer's values.
        projector: Of these entries.
    """

    def __init__(self, entries: Sequence[int], projector: Projector) -> None:
        super().__init__()
        self.entries = list(entries)
        self.projector = projector
        self.gate = Gate(len(self.entries))
        #: Whether training recomputes hidden states in the backward pass rather than keep them.
        self.gradient_checkpointing = False
        self._cast_weights: tuple[tuple[object, ...], dict[int, torch.Tensor]] | None = None

    def train(self, mode: bool = True) -> "FuserGroup":
        """Set the mode, and drop cached copies of the weights, since fused optimizers do not count their writes."""
        self._cast_weights, self.gate._open = None, None
        return super().train(mode)

    def active_entries(self) -> list[int]:
        """Return the entries of the group that have an effect: all of them in training, else those with open gates."""
        return list(range(len(self.entries))) if self.training else self.gate.open_entries()

    def parts(self, num_tokens: int, dtype: torch.dtype) -> list[slice]:
        """Split the active entries into those that run at once: all, but at inference on the CPU `PART_BYTES` each."""
        count, weight = len(self.active_entries()), self.projector.in_proj.weight
        if self.training or weight.device.type != "cpu":
            return [slice(0, count)] if count else []
        size = max(1, PART_BYTES // max(1, num_tokens * weight.shape[1] * dtype.itemsize))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def forward(
        self, sharer_states: torch.Tensor, receiver_states: torch.Tensor, temperature: torch.Tensor, part: slice
    ) -> torch.Tensor:
        """Compute the change of the receiver's states for a part of the active entries.

        Args:
            sharer_states: `(num_entries, num_tokens, sharer_width)`, in the receiver's dtype.
            receiver_states: `(num_entries, num_tokens, receiver_width)`.
            temperature: Scalar, used in training only.
            part: Which of the active entries.

        Returns:
            `(num_entries, num_tokens, receiver_width)`.
        """
        select = self._weight_selector(receiver_states.dtype, part)
        if not self.training:
            return self.projector(sharer_states, receiver_states, None, select)
        gate = self.gate.soft(receiver_states.shape[1], self.projector.num_heads, temperature)
        if self.gradient_checkpointing:
            return checkpoint(self.projector, sharer_states, receiver_states, gate, select, use_reentrant=False)
        return self.projector(sharer_states, receiver_states, gate, select)

    def _weight_selector(self, dtype: torch.dtype, part: slice) -> WeightSelector:
        """Return a function that takes a part of the active entries out of a weight, in the dtype of the states."""
        active = self.active_entries()
        if self.training or torch.is_grad_enabled():
            chosen = slice(None) if self.training else active[part]
            # Autocast casts by itself and keeps its copies.
            casts = torch.is_autocast_enabled(self.gate.gate_logit.device.type)
            return partial(select_entries, entries=chosen, dtype=None if casts else dtype)
        parameters = list(self.projector.parameters())
        if len(active) == len(self.entries) and all(value.dtype == dtype for value in parameters):
            return partial(select_entries, entries=part)
        key = (dtype, tuple(active), *map(_version, parameters))
        kept = self._cast_weights
        if kept is None or kept[0] != key:
            kept = (key, {id(value): value[active].to(dtype) for value in parameters})
            self._cast_weights = kept
        return partial(select_from_copies, copies=kept[1], entries=part)


class FuserPart(NamedTuple):
    """Entries that run at once.

    Attributes:
        group: Their group.
        selected: Which of the group's active entries they are.
        entries: The receiver's entry of each: layer index, for values after all layers' keys.
        sources: The sharer's entries of each, likewise, whose states it gets side by side.
    """

    group: FuserGroup
    selected: slice
    entries: list[int]
    sources: list[list[int]]


class SourceStates(Protocol):
    """States of chosen tokens, of which entries are gathered when they are asked for."""

    def gather_joined(self, indices: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return several entries side by side each, `(len(indices), num_tokens, their width together)`."""
        ...


def source_layers(config: C2CConfig, sharer: SharerConfig) -> list[list[int]]:
    """Return the sharer layers of every receiver layer.

    Args:
        config: Receiver layer shapes, `layer_alignment` and `fusion_source_layers`.
        sharer: Sharer layer shapes, and for `layer_alignment="learned"` the chosen layers.

    Raises:
        ValueError: The chosen layers do not fit.
    """
    num_layers, num_sharer_layers = len(config.receiver_layer_shapes or []), len(sharer.layer_shapes or [])
    if config.layer_alignment != "learned":
        return [[layer] for layer in layer_mapping(num_layers, num_sharer_layers, config.layer_alignment)]
    return several_source_layers(
        "fusion_source_layers",
        sharer.fusion_source_layers,
        num_layers,
        num_sharer_layers,
        config.fusion_source_layers,
    )


def layer_entries(layers: Sequence[Sequence[int]], num_source_layers: int, joint: bool) -> list[list[int]]:
    """Turn source layers into source entries: layer indices, for values after all layers' keys.

    Args:
        layers: Per layer its source layers.
        num_source_layers: Number of these.
        joint: Keys and values both take keys and values; else keys take keys and values take values.

    Returns:
        Per entry, every layer's keys, then every layer's values, its source entries.
    """
    if joint:
        return [[kind * num_source_layers + layer for layer in own for kind in (0, 1)] for own in layers] * 2
    return [[kind * num_source_layers + layer for layer in own] for kind in (0, 1) for own in layers]


class C2CFuser(nn.Module):
    """Projects one sharer's key/value states into the receiver's, for all layers.

    Args:
        config: Receiver layer shapes, layer alignment, initialization and gate temperature.
        sharer: Sharer layer shapes and sizes.
    """

    #: What computes a group of entries.
    projector_class: type[Projector] = Projector

    gate_temperature: torch.Tensor

    def __init__(self, config: C2CConfig, sharer: SharerConfig) -> None:
        super().__init__()
        receiver_shapes = config.receiver_layer_shapes or []
        self.num_layers = len(receiver_shapes)
        #: The sharer's entries that each receiver entry is fused with, and their widths.
        self.sources, sharer_widths = self._find_sources(config, sharer)
        receiver_widths = entry_widths(receiver_shapes)
        members: dict[tuple[int, int, int], list[int]] = {}
        for entry, sources in enumerate(self.sources):
            sharer_width = sum(sharer_widths[source] for source in sources)
            num_heads = receiver_shapes[entry % self.num_layers][0]
            members.setdefault((sharer_width, receiver_widths[entry], num_heads), []).append(entry)
        groups = [
            FuserGroup(entries, self.projector_class(len(entries), *shape, sharer))
            for shape, entries in members.items()
        ]
        if config.fuser_initialization == "zero_output":
            for group in groups:
                nn.init.ones_(group.gate.gate_logit)
                for parameter in group.projector.out_proj.parameters():
                    nn.init.zeros_(parameter)
        self.groups: Sequence[FuserGroup] = nn.ModuleList(groups)  # type: ignore[assignment]
        self.register_buffer("gate_temperature", torch.tensor(float(config.initial_gate_temperature)))

    def _find_sources(self, config: C2CConfig, sharer: SharerConfig) -> tuple[list[list[int]], list[int]]:
        """Return the source entries of every receiver entry, and the widths of all source entries."""
        layer_shapes = sharer.layer_shapes or []
        entries = layer_entries(source_layers(config, sharer), len(layer_shapes), config.joint_keys_values)
        return entries, entry_widths(layer_shapes)

    def source_states(self, sharer_tokens: SourceStates, dtype: torch.dtype) -> SourceStates:
        """Return the states that `part.sources` count: the sharer's own.

        Args:
            sharer_tokens: The sharer's states at the aligned positions.
            dtype: Of the receiver's states.
        """
        return sharer_tokens

    def parts(self, num_tokens: int, dtype: torch.dtype) -> list[FuserPart]:
        """Split the entries that have an effect into parts that run at once.

        States need to be gathered for one part at a time only.

        Args:
            num_tokens: Number of fused tokens.
            dtype: Of the receiver's states.
        """
        parts = []
        for group in self.groups:
            active = [group.entries[i] for i in group.active_entries()]
            for selected in group.parts(num_tokens, dtype):
                entries = active[selected]
                parts.append(FuserPart(group, selected, entries, [self.sources[entry] for entry in entries]))
        return parts

    def forward(self, part: FuserPart, sharer_states: torch.Tensor, receiver_states: torch.Tensor) -> torch.Tensor:
        """Compute how the receiver's states change.

        Args:
            part: One of [`C2CFuser.parts`].
            sharer_states: `(num_entries, num_tokens, sharer_width)`, the entries `part.sources` at the aligned
                positions, those of one receiver entry side by side.
            receiver_states: `(num_entries, num_tokens, receiver_width)`, the entries `part.entries` there.

        Returns:
            The changes, in shape and dtype of `receiver_states`.
        """
        sharer_states = sharer_states.to(receiver_states)
        change = part.group(sharer_states, receiver_states, self.gate_temperature, part.selected)
        return change.to(receiver_states.dtype)

    def locate(self, entry: int) -> tuple[FuserGroup, int]:
        """Return the group of an entry, and its index there."""
        for group in self.groups:
            if entry in group.entries:
                return group, group.entries.index(entry)
        raise IndexError(f"`entry` must be below {2 * self.num_layers}, but got {entry}.")


def _version(parameter: torch.Tensor) -> object:
    """Return a key that changes when a parameter is moved or written to; inference tensors have no version counter."""
    return object() if parameter.is_inference() else (parameter.data_ptr(), parameter._version)


def entry_widths(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Return heads x head_dim of every layer's keys, then of every layer's values."""
    keys = [heads * key_dim for heads, key_dim, _ in shapes]
    values = [heads * value_dim for heads, _, value_dim in shapes]
    return keys + values
