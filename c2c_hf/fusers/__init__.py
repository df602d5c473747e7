"""Fusers: `nn.Module`s that map key/value states of a sharer to those of the receiver; tensors in, tensors out."""

import torch
from torch import nn

from ..configuration_c2c import C2CConfig
from .c2c import C2CFuser
from .c2c_complex import C2CComplexFuser
from .c2c_shared import C2CSharedFuser
from .memory import MemoryFuser

#: The fusers of fusion mode by `C2CConfig.fuser_type`.
FUSER_CLASSES: dict[str, type[C2CFuser]] = {
    "c2c": C2CFuser,
    "c2c_complex": C2CComplexFuser,
    "c2c_shared": C2CSharedFuser,
}


def build_fusers(config: C2CConfig) -> list[C2CFuser | MemoryFuser]:
    """Build one untrained fuser per sharer, of the class that `config.mode` and `config.fuser_type` ask for.

    Args:
        config: With the layer shapes of receiver and sharers.
    """
    fuser_class = MemoryFuser if config.mode == "memory" else FUSER_CLASSES[config.fuser_type]
    fusers = [fuser_class(config, sharer) for sharer in config.sharers]
    for fuser in fusers[1:]:
        if isinstance(fuser, C2CSharedFuser) and isinstance(fusers[0], C2CSharedFuser):
            fuser.share_projectors(fusers[0])
    return fusers


def fuser_state_dict(fusers: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a model's fusers by name; one that several fusers share is there once.

    Args:
        fusers: The list of fusers.
    """
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in fusers.state_dict(prefix="fuser.", keep_vars=True).items():
        found.setdefault(id(value), (name, value.detach()))
    return dict(found.values())
