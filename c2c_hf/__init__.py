"""Cache-to-Cache: language models that communicate through their key/value caches (arXiv 2510.03215)."""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import C2CCache
from .configuration_c2c import C2CConfig
from .conversion import convert_reference_checkpoint
from .modeling_c2c import C2CForCausalLM

__all__ = ["C2CCache", "C2CConfig", "C2CForCausalLM", "convert_reference_checkpoint"]

AutoConfig.register(C2CConfig.model_type, C2CConfig)
AutoModelForCausalLM.register(C2CConfig, C2CForCausalLM)
