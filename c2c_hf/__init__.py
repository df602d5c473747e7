"""Cache-to-Cache: language models that communicate through their key/value caches (arXiv 2510.03215)."""

from importlib import import_module
from typing import TYPE_CHECKING

from ._import_hook import call_when_imported

if TYPE_CHECKING:
    from .configuration_c2c import C2CConfig, SharerConfig
    from .convert_reference import convert_reference_checkpoint
    from .fitting.layer_mapping import fit_layer_mapping
    from .fitting.ridge import fit_ridge
    from .inference.cache import C2CCache
    from .inference.sharer_cache import SharerCache
    from .modeling_c2c import C2CForCausalLM
    from .processing_c2c import C2CProcessor
    from .training.arguments import C2CTrainingArguments
    from .training.collator import C2CDataCollator
    from .training.shared_space import SharedSpaceTrainer, add_sharer, share_encoders
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
    "SharedSpaceTrainer",
    "SharerConfig",
    "__version__",
    "add_sharer",
    "convert_reference_checkpoint",
    "fit_layer_mapping",
    "fit_ridge",
    "share_encoders",
]

__version__ = "0.1.0"

#: The module of every public name, imported when the name is first used.
_MODULES = {
    "C2CCache": ".inference.cache",
    "C2CConfig": ".configuration_c2c",
    "C2CDataCollator": ".training.collator",
    "C2CForCausalLM": ".modeling_c2c",
    "C2CProcessor": ".processing_c2c",
    "C2CTrainer": ".training.trainer",
    "C2CTrainingArguments": ".training.arguments",
    "SharedSpaceTrainer": ".training.shared_space",
    "SharerCache": ".inference.sharer_cache",
    "SharerConfig": ".configuration_c2c",
    "add_sharer": ".training.shared_space",
    "convert_reference_checkpoint": ".convert_reference",
    "fit_layer_mapping": ".fitting.layer_mapping",
    "fit_ridge": ".fitting.ridge",
    "share_encoders": ".training.shared_space",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_auto_classes() -> None:
    """Register configuration, model and processor with the Auto classes of transformers, and the pipeline."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

    from .configuration_c2c import C2CConfig
    from .integrations.pipeline import register_pipeline
    from .modeling_c2c import C2CForCausalLM
    from .processing_c2c import C2CProcessor

    AutoConfig.register(C2CConfig.model_type, C2CConfig)
    AutoModelForCausalLM.register(C2CConfig, C2CForCausalLM)
    AutoProcessor.register(C2CConfig, C2CProcessor)
    register_pipeline()


# Importing transformers takes seconds, for which `c2c --help` does not wait; without it there are no Auto classes.
call_when_imported("transformers", __name__, _register_auto_classes)
