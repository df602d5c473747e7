"""Cache-to-Cache: language models that communicate through their key/value caches (arXiv 2510.03215)."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_c2c import C2CConfig
    from .convert_reference import convert_reference_checkpoint
    from .fitting.ridge import fit_ridge
    from .inference.cache import C2CCache
    from .inference.sharer_cache import SharerCache
    from .modeling_c2c import C2CForCausalLM
    from .processing_c2c import C2CProcessor
    from .training.arguments import C2CTrainingArguments
    from .training.collator import C2CDataCollator
    from .training.trainer import C2CTrainer

__all__ = [
    "C2CCache",
    "C2CConfig",
    "C2CDataCollator",
    "C2CForCausalLM",
    "C2CProcessor",
    "C2CTrainer",
    "C2CTrainingArguments",
    "SharerCache",
    "__version__",
    "convert_reference_checkpoint",
    "fit_ridge",
]

__version__ = "0.1.0"

_MODULES = {
    "C2CCache": ".inference.cache",
    "C2CConfig": ".configuration_c2c",
    "C2CForCausalLM": ".modeling_c2c",
    "C2CProcessor": ".processing_c2c",
    "SharerCache": ".inference.sharer_cache",
    "convert_reference_checkpoint": ".convert_reference",
}
# Training brings the Trainer and the data sets' library, which those who only generate need not wait for.
_TRAINING_MODULES = {
    "C2CDataCollator": ".training.collator",
    "C2CTrainer": ".training.trainer",
    "C2CTrainingArguments": ".training.arguments",
    "fit_ridge": ".fitting.ridge",
}


def _register() -> None:
    """Make the Auto classes of transformers know this package's; the public names stand in the module from then on."""
    for name, module in _MODULES.items():
        globals()[name] = getattr(import_module(module, __name__), name)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

    config_class = globals()["C2CConfig"]
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, globals()["C2CForCausalLM"])
    AutoProcessor.register(config_class, globals()["C2CProcessor"])


def __getattr__(name: str) -> Any:
    if name in _TRAINING_MODULES:
        globals()[name] = getattr(import_module(_TRAINING_MODULES[name], __name__), name)
    elif name in _MODULES:
        _register()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


# The command `c2c` answers `--help` without torch; its commands register when they first use a public name.
if Path(sys.argv[0] if sys.argv else "").stem != "c2c":
    _register()
