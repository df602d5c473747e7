"""A latent space that sharers are mapped into and receivers are fused from (arXiv 2510.03215, table 14).

Each sharer has a network into the space, each receiver a projector out of it, each pair its gates: for N models that
all share with all, N networks and N projectors.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ..configuration_c2c import C2CConfig, SharerConfig, layer_mapping
from .c2c import C2CFuser, SourceStates, entry_widths, layer_entries
from .c2c_complex import SharerNetwork
from .grouped_linear import select_entries


class LatentEncoder(nn.Module):
    """Maps one sharer's states to the latent space's entries; it does not depend on a receiver.

    Args:
        config: `shared_num_layers`, `shared_hidden_size` and `joint_keys_values`.
        sharer: Sharer layer shapes and sizes.
    """

    def __init__(self, config: C2CConfig, sharer: SharerConfig) -> None:
        super().__init__()
        shapes = sharer.layer_shapes or []
        layers = layer_mapping(config.shared_num_layers, len(shapes), "depth_normalized")
        widths = entry_widths(shapes)
        #: The sharer's entries of each latent entry.
        self.sources = layer_entries([[layer] for layer in layers], len(shapes), config.joint_keys_values)
        members: dict[int, list[int]] = {}
        for entry, sources in enumerate(self.sources):
            members.setdefault(sum(widths[source] for source in sources), []).append(entry)
        #: The latent entries of each network.
        self.members = list(members.values())
        self.networks: Sequence[SharerNetwork] = nn.ModuleList(  # type: ignore[assignment]
            SharerNetwork(len(entries), width, config.shared_hidden_size, sharer) for width, entries in members.items()
        )

    def forward(self, sharer_tokens: SourceStates, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return every latent entry, `(num_tokens, shared_hidden_size)` each.

        Args:
            sharer_tokens: The sharer's states.
            dtype: To compute in.
        """
        latents: dict[int, torch.Tensor] = {}
        for entries, network in zip(self.members, self.networks, strict=True):
            weight = network.in_proj.weight
            # Autocast casts by itself.
            select = partial(select_entries, dtype=None if torch.is_autocast_enabled(weight.device.type) else dtype)
            states = sharer_tokens.gather_joined([self.sources[entry] for entry in entries])
            latents |= zip(entries, network(states.to(dtype), select).unbind(0), strict=True)
        return [latents[entry] for entry in range(len(self.sources))]


class LatentStates:
    """Latent entries of chosen tokens.

    Args:
        entries: `(num_tokens, shared_hidden_size)` each.
    """

    def __init__(self, entries: Sequence[torch.Tensor]) -> None:
        self._entries = entries

    def gather_joined(self, indices: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return several entries side by side each, `(len(indices), num_tokens, their width together)`."""
        return torch.stack([torch.cat([self._entries[index] for index in joined], dim=-1) for joined in indices])


class C2CSharedFuser(C2CFuser):
    """A [`C2CFuser`] whose sources are latent entries; fusers of one receiver have the same projectors.

    Args:
        config: Receiver layer shapes, layer alignment to the latent layers, initialization and gate temperature.
        sharer: Sharer layer shapes and sizes.
    """

    def __init__(self, config: C2CConfig, sharer: SharerConfig) -> None:
        super().__init__(config, sharer)
        self.encoder = LatentEncoder(config, sharer)

    def _find_sources(self, config: C2CConfig, sharer: SharerConfig) -> tuple[list[list[int]], list[int]]:
        num_layers = config.shared_num_layers
        layers = layer_mapping(len(config.receiver_layer_shapes or []), num_layers, config.layer_alignment)
        # Keys and values are joined, if at all, where the latents are made.
        entries = layer_entries([[layer] for layer in layers], num_layers, joint=False)
        return entries, [config.shared_hidden_size] * (2 * num_layers)

    def source_states(self, sharer_tokens: SourceStates, dtype: torch.dtype) -> SourceStates:
        """Return the latents, which `part.sources` count."""
        return LatentStates(self.encoder(sharer_tokens, dtype))

    def share_projectors(self, other: "C2CSharedFuser") -> None:
        """Take the projectors of another fuser of the same receiver in place of its own."""
        for group, others in zip(self.groups, other.groups, strict=True):
            group.projector = others.projector
