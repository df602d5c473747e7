"""Loading of base models and of fuser weights, and the checks that they belong together."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

#: Keyword arguments of `from_pretrained` that say where on the Hub a file is.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies")


def load_base_model(
    model: str | Path | PreTrainedModel, role: str, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str | None, str | None]:
    """Load a receiver or sharer, or take one that is loaded.

    Args:
        model: Hub id, folder, or a loaded model.
        role: `"receiver"` or `"sharers"`, for errors.
        model_kwargs: Go to the model's own `from_pretrained`.

    Returns:
        The model, its name or path (`None` if unknown) and its revision (a commit hash where one can be found).

    Raises:
        TypeError: Neither a name nor a model.
        ValueError: The folder does not exist.
    """
    if isinstance(model, torch.nn.Module):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"`{role}` must be a transformers model, a Hub id or a folder, but got {type(model).__name__}."
            )
        return model, model.name_or_path or None, getattr(model.config, "_commit_hash", None)
    if not isinstance(model, str | Path):
        raise TypeError(f"`{role}` must be a transformers model, a Hub id or a folder, but got {type(model).__name__}.")
    name = str(model)
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(
            f"`{role}`: the folder {name!r} does not exist; hand over the model itself or the folder where it is now."
        )
    loaded = AutoModelForCausalLM.from_pretrained(name, **model_kwargs)
    return loaded, name, resolve_revision(name, model_kwargs)


def resolve_revision(name: str, model_kwargs: dict[str, Any]) -> str | None:
    """Return the commit from which a Hub model was loaded, or the revision asked for, or `None` for a folder."""
    if Path(name).is_dir():
        return None
    hub_kwargs = {key: value for key, value in model_kwargs.items() if key in HUB_ARGUMENTS}
    path = cached_file(name, "config.json", **hub_kwargs, _raise_exceptions_for_missing_entries=False)
    commit = re.search(r"snapshots/([0-9a-f]{40})/", Path(path).as_posix()) if path else None
    return commit.group(1) if commit else model_kwargs.get("revision")


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str | None:
    """Hash a sample of a model's weights, so that a fuser meets the models that it was trained with.

    The sample is rounded to bfloat16: loading the same weights in another precision gives the same hash.

    Returns:
        16 hexadecimal digits; `None` for quantized models and weights that are not in memory.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    samples = []
    for _, parameter in sorted(model.named_parameters()):
        if parameter.device.type == "meta" or not parameter.is_floating_point():
            return None
        samples.append(parameter.detach().flatten()[:16].to(device="cpu", dtype=torch.bfloat16))
    return hashlib.sha256(torch.cat(samples).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def check_base_model(role: str, field: str, saved: object, found: object, hint: str = "") -> None:
    """Refuse a base model that differs from the one that the fuser was made for.

    Args:
        role: Names the model in the error.
        field: What is compared.
        saved: The value in the configuration; `None` is not compared.
        found: The value of the model at hand; `None` is not compared.
        hint: How to go on all the same.

    Raises:
        ValueError: They differ.
    """
    if saved is not None and found is not None and saved != found:
        raise ValueError(
            f"`{role}`: this fuser was made for a model with {field} {saved}, but the model at hand has {found}; load the "
            f"base model that the fuser was trained with.{hint}"
        )


def load_fuser_weights(name_or_path: str | Path, hub_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read the weights of a saved fuser, from one safetensors file or from shards.

    Args:
        name_or_path: Hub id or folder.
        hub_kwargs: Where on the Hub, see `HUB_ARGUMENTS`.

    Raises:
        OSError: No safetensors file there.
        ValueError: A damaged file, or an index that points outside the folder.
    """
    name = str(name_or_path)
    index_path = _find(name, SAFE_WEIGHTS_INDEX_NAME, hub_kwargs)
    single_path = _find(name, SAFE_WEIGHTS_NAME, hub_kwargs)
    if single_path is not None:
        return _read_safetensors(single_path)
    if index_path is None:
        raise OSError(f"`pretrained_model_name_or_path`: {name!r} holds no {SAFE_WEIGHTS_NAME}, so it is no saved fuser.")
    try:
        shards = sorted(set(json.loads(Path(index_path).read_text(encoding="utf-8"))["weight_map"].values()))
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"The index {SAFE_WEIGHTS_INDEX_NAME} of {name!r} is damaged; download or save it anew.") from error
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ValueError(f"The index of {name!r} names {shard!r}, which is no safetensors file in its own folder.")
        path = _find(name, shard, hub_kwargs)
        if path is None:
            raise OSError(f"{name!r} lacks the shard {shard}; download or save it anew.")
        weights.update(_read_safetensors(path))
    return weights


def _find(name: str, filename: str, hub_kwargs: dict[str, Any]) -> str | None:
    return cached_file(
        name,
        filename,
        **hub_kwargs,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{Path(path).name} is truncated or no safetensors file ({error}); download or save it anew."
        ) from error


def check_fuser_weights(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare names and shapes of saved weights with those that the configuration and the base models ask for.

    Raises:
        ValueError: They differ.
    """
    missing, foreign = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or foreign:
        raise ValueError(
            f"The checkpoint is not that of this fuser: {_some(missing)} missing and {_some(foreign)} unknown."
        )
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"The checkpoint does not fit: {name} has shape {tuple(value.shape)}, but the configuration and base models "
                f"ask for {tuple(expected[name].shape)}."
            )


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} weights ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else "none"
