"""A PEFT adapter on the receiver, trained beside a fuser or instead of one, and saved beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .download import find_file
from .fuser_weights import read_safetensors

if TYPE_CHECKING:
    from peft import PeftConfig

#: Folder of the adapter inside a fuser's folder, where the Auto classes would take it for the model.
ADAPTER_FOLDER = "receiver_adapter"
_NAME = "default"
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Importing `peft` takes a second, hence it is imported only where there is an adapter.


def add_adapter(receiver: PreTrainedModel, peft_config: "PeftConfig") -> None:
    """Add a new adapter to a receiver and make its weights the only trainable ones of the receiver.

    Args:
        receiver: The base model.
        peft_config: A `peft.PeftConfig` of an adapter inside the layers, such as `LoraConfig`.

    Raises:
        ValueError: The receiver has an adapter already, or the configuration is not of this kind.
    """
    from peft import PeftConfig, inject_adapter_in_model

    if has_adapter(receiver):
        raise ValueError("`peft_config`: the receiver has an adapter already; start from one without.")
    if not isinstance(peft_config, PeftConfig) or peft_config.is_prompt_learning:
        raise ValueError(
            "`peft_config` must be a PEFT configuration of an adapter inside the layers, such as LoraConfig, but got "
            f"{type(peft_config).__name__}."
        )
    inject_adapter_in_model(peft_config, receiver, _NAME)
    # In float32 like the fuser's weights; autocast computes in the receiver's dtype.
    for parameter in receiver.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapter(receiver: PreTrainedModel) -> bool:
    """Return whether a receiver has a PEFT adapter."""
    return bool(getattr(receiver, "peft_config", None))


def trains(receiver: PreTrainedModel) -> bool:
    """Return whether gradients must reach into the receiver."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in receiver.parameters())


def set_adapter_mode(receiver: PreTrainedModel, training: bool) -> None:
    """Set training or evaluation mode for the dropout of an adapter; the receiver itself stays in evaluation mode."""
    for name, module in receiver.named_modules():
        if ".lora_dropout." in name:
            module.train(training)


@contextmanager
def adapter_disabled(receiver: PreTrainedModel) -> Iterator[None]:
    """Disable a receiver's adapter within this context."""
    if not has_adapter(receiver):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in receiver.modules() if isinstance(module, BaseTunerLayer)]
    trained = {name for name, parameter in receiver.named_parameters() if parameter.requires_grad}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # Enabling also makes frozen adapters trainable.
        for name, parameter in receiver.named_parameters():
            parameter.requires_grad_(name in trained)


def save_adapter(receiver: PreTrainedModel, folder: Path) -> None:
    """Save a receiver's adapter in PEFT's own format into a new folder."""
    from peft import get_peft_model_state_dict

    (name,) = receiver.peft_config
    folder.mkdir(parents=True)
    weights = get_peft_model_state_dict(receiver, adapter_name=name)
    save_file({key: value.contiguous().cpu() for key, value in weights.items()}, folder / _WEIGHTS_FILE)
    config = receiver.peft_config[name]
    config.base_model_name_or_path = receiver.name_or_path
    config.save_pretrained(str(folder))


def load_adapter(receiver: PreTrainedModel, name_or_path: str | Path, hub_kwargs: dict[str, Any]) -> None:
    """Load the adapter that was saved beside a fuser into the receiver, if there is one.

    Args:
        receiver: The base model. If it has an adapter already, its weights are replaced.
        name_or_path: Hub id or folder of the fuser.
        hub_kwargs: Arguments of the Hub, see `HUB_KWARGS`.

    Raises:
        ValueError: The files are incomplete or do not fit the receiver.
        OSError: The Hub does not answer.
    """
    config_path, weights_path = (
        find_file(str(name_or_path), f"{ADAPTER_FOLDER}/{name}", hub_kwargs) for name in (_CONFIG_FILE, _WEIGHTS_FILE)
    )
    if config_path is None and weights_path is None:
        return
    if config_path is None or weights_path is None:
        raise ValueError(f"{str(name_or_path)!r} holds half of an adapter in {ADAPTER_FOLDER}; save it again.")
    from peft import PeftConfig, set_peft_model_state_dict

    weights = read_safetensors(weights_path)
    if not has_adapter(receiver):
        add_adapter(receiver, PeftConfig.from_pretrained(str(Path(config_path).parent)))
    (name,) = receiver.peft_config
    # `Any`, since PEFT annotates the result as a named tuple without fields.
    result: Any = set_peft_model_state_dict(receiver, weights, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"The adapter of {str(name_or_path)!r} does not fit the receiver: {len(missing)} weights missing, "
            f"{len(result.unexpected_keys)} unknown."
        )
