"""PEFT adapters of base models, saved beside a fuser: the receiver's can be trained with it or instead of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from .download import find_file
from .fuser_weights import read_safetensors

if TYPE_CHECKING:
    from peft import PeftConfig

#: Folder of the receiver's adapter inside a fuser's folder, where the Auto classes would take it for the model.
ADAPTER_FOLDER = "receiver_adapter"
#: Folder of a sharer's adapter, for `str.format`.
SHARER_ADAPTER_FOLDER = "sharer_{}_adapter"
#: The names of all such folders.
ADAPTER_FOLDERS = rf"{ADAPTER_FOLDER}|{SHARER_ADAPTER_FOLDER.format('[0-9]+')}"
_NAME = "default"
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
#: PEFT's files name weights as its wrapper `PeftModel` holds them; an injected adapter has no wrapper.
_WRAPPER = "base_model.model."

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


def unwrap_peft_model(model: nn.Module, role: str) -> PreTrainedModel:
    """Return the base model of a `PeftModel`, which keeps the adapter in its layers.

    Args:
        model: Any model.
        role: `"receiver"` or `"sharers"`, for errors.

    Raises:
        TypeError: It is neither a model of transformers nor PEFT's.
        ValueError: It has several adapters, or one that is not inside the layers.
    """
    if not isinstance(model, PreTrainedModel):
        from peft import PeftModel

        if not isinstance(model, PeftModel):
            raise TypeError(
                f"`{role}` must be a transformers model, a Hub id or a folder, but got {type(model).__name__}."
            )
        config = model.active_peft_config
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"`{role}`: an adapter of type {config.peft_type.value} is not inside the layers of the base model; "
                "use one that is, such as LoRA."
            )
        model = model.get_base_model()
    _adapter_name(model, role)
    return model


def has_adapter(receiver: PreTrainedModel) -> bool:
    """Return whether a receiver has a PEFT adapter."""
    return bool(getattr(receiver, "peft_config", None))


def _adapter_name(model: PreTrainedModel, role: str) -> str | None:
    """Return the name of a model's adapter, or `None` without one.

    Raises:
        ValueError: It has several.
    """
    names = list(getattr(model, "peft_config", None) or ())
    if len(names) > 1:
        raise ValueError(f"`{role}` has several adapters, {names}; keep one, by PEFT's `delete_adapter`.")
    return names[0] if names else None


def remove_adapter(module: nn.Module) -> None:
    """Replace all PEFT layers in a module by the layers that they adapt."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, layer in list(module.named_modules()):
        own = layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer
        own = own.get_base_layer() if isinstance(own, BaseTunerLayer) else own
        if own is not layer:
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, own)


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
    """Save a base model's adapter, if it has one, in PEFT's own format into a new folder.

    Raises:
        ValueError: It has several.
    """
    name = _adapter_name(receiver, "receiver" if folder.name == ADAPTER_FOLDER else "sharers")
    if name is None:
        return
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    weights = get_peft_model_state_dict(receiver, adapter_name=name)
    save_file({_WRAPPER + key: value.contiguous().cpu() for key, value in weights.items()}, folder / _WEIGHTS_FILE)
    config = receiver.peft_config[name]
    config.base_model_name_or_path = receiver.name_or_path
    config.save_pretrained(str(folder))


def load_adapter(
    receiver: PreTrainedModel,
    name_or_path: str | Path,
    hub_kwargs: dict[str, Any],
    folder: str = ADAPTER_FOLDER,
    required: bool = False,
) -> None:
    """Load the adapter that was saved beside a fuser into the receiver or a sharer, if there is one.

    Args:
        receiver: The base model. If it has an adapter already, its weights are replaced.
        name_or_path: Hub id or folder of the fuser.
        hub_kwargs: Arguments of the Hub, see `HUB_KWARGS`.
        folder: Of the adapter, in the fuser's.
        required: Refuse a fuser without one.

    Raises:
        ValueError: The files are incomplete or do not fit the receiver.
        OSError: The Hub does not answer.
    """
    config_path, weights_path = (
        find_file(str(name_or_path), f"{folder}/{name}", hub_kwargs) for name in (_CONFIG_FILE, _WEIGHTS_FILE)
    )
    if config_path is None and weights_path is None and not required:
        return
    if config_path is None or weights_path is None:
        part = "half of" if config_path or weights_path else "nothing of"
        raise ValueError(f"{str(name_or_path)!r} holds {part} an adapter in {folder}; save it again.")
    from peft import PeftConfig

    weights = read_safetensors(weights_path)
    if not has_adapter(receiver):
        add_adapter(receiver, PeftConfig.from_pretrained(str(Path(config_path).parent)))
    set_adapter_weights(receiver, weights, f"in {folder} of {str(name_or_path)!r}")


def set_adapter_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Replace the weights of a model's adapter.

    Args:
        model: A base model with one adapter in its layers.
        weights: Under the names of PEFT's files.
        source: Where they come from, for the error.

    Raises:
        ValueError: They do not fit the model.
    """
    from peft import set_peft_model_state_dict

    (name,) = model.peft_config
    own = {key.removeprefix(_WRAPPER): value for key, value in weights.items()}
    # `Any`, since PEFT annotates the result as a named tuple without fields.
    result: Any = set_peft_model_state_dict(model, own, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"The adapter {source} does not fit the base model: {len(missing)} weights missing, "
            f"{len(result.unexpected_keys)} unknown."
        )
