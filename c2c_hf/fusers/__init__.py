"""Fusers: `nn.Module`s that map key/value states of a sharer to those of the receiver; tensors in, tensors out."""

from ..configuration_c2c import C2CConfig
from .c2c import C2CFuser
from .memory import MemoryFuser


def build_fusers(config: C2CConfig) -> list[C2CFuser | MemoryFuser]:
    """Build one untrained fuser per sharer, of the class that `config.mode` asks for.

    Args:
        config: With the layer shapes of receiver and sharers.
    """
    fuser_class = MemoryFuser if config.mode == "memory" else C2CFuser
    return [fuser_class(config, sharer) for sharer in config.sharers]
