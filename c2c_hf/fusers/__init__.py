"""Fusers: `nn.Module`s that map key/value states of a sharer to those of the receiver; tensors in, tensors out."""

from ..configuration_c2c import C2CConfig
from .c2c import C2CFuser
from .c2c_complex import C2CComplexFuser
from .memory import MemoryFuser

#: The fusers of fusion mode by `C2CConfig.fuser_type`.
FUSER_CLASSES: dict[str, type[C2CFuser]] = {"c2c": C2CFuser, "c2c_complex": C2CComplexFuser}


def build_fusers(config: C2CConfig) -> list[C2CFuser | MemoryFuser]:
    """Build one untrained fuser per sharer, of the class that `config.mode` and `config.fuser_type` ask for.

    Args:
        config: With the layer shapes of receiver and sharers.
    """
    fuser_class = MemoryFuser if config.mode == "memory" else FUSER_CLASSES[config.fuser_type]
    return [fuser_class(config, sharer) for sharer in config.sharers]
