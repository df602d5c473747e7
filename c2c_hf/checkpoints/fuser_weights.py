"""Load the weights of a saved fuser and validate file names, shards, names and shapes; matrices in 8 bits.

[`C2CForCausalLM.save_pretrained`] writes them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_c2c import C2CConfig
from ..fusers import build_fusers, fuser_state_dict
from .download import check_download, check_subfolder, find_file

#: In a file, the scale of a matrix in 8 bits has the matrix's name with this ending.
_SCALE = "_scale"


def is_own_weight(name: str) -> bool:
    """Say whether a weight is this package's, by its name; all others belong to base models."""
    return name.startswith(("fuser.", "token_table_"))


def load_fuser_weights(name_or_path: str | Path, hub_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Read the weights of a saved fuser, from one safetensors file or from shards.

    Args:
        name_or_path: Hub id or folder.
        hub_kwargs: Where on the Hub, see `HUB_KWARGS`.

    Returns:
        The weights by name; matrices in 8 bits as float32.

    Raises:
        OSError: No safetensors file there, or the Hub does not answer.
        ValueError: A damaged file, or an index or a subfolder that points outside the folder.
    """
    return dequantize(_load_files(str(name_or_path), hub_kwargs))


def _load_files(name: str, hub_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    check_subfolder(hub_kwargs.get("subfolder"))
    single_path = find_file(name, SAFE_WEIGHTS_NAME, hub_kwargs)
    if single_path is not None:
        return read_safetensors(single_path)
    index_path = find_file(name, SAFE_WEIGHTS_INDEX_NAME, hub_kwargs)
    if index_path is None:
        raise OSError(
            f"`pretrained_model_name_or_path`: {name!r} holds no {SAFE_WEIGHTS_NAME}, so it is no saved fuser."
        )
    try:
        shards = sorted(set(json.loads(Path(index_path).read_text(encoding="utf-8"))["weight_map"].values()), key=str)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The index {SAFE_WEIGHTS_INDEX_NAME} of {name!r} is damaged; download or save it anew."
        ) from error
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ValueError(f"The index of {name!r} names {shard!r}, which is no safetensors file in its own folder.")
        path = find_file(name, shard, hub_kwargs)
        if path is None:
            raise OSError(f"{name!r} lacks the shard {shard}; download or save it anew.")
        weights.update(read_safetensors(path))
    return weights


def quantize(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Round matrices to 8 bits, each row with a scale of its own: a quarter of float32's size.

    Args:
        weights: By name.

    Returns:
        The same names; a floating matrix `(..., rows, columns)` as int8, beside its scale `(..., rows, 1)`, float32.
        Vectors and integers stay as they are.
    """
    rounded: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        if not value.is_floating_point() or value.dim() < 2:
            rounded[name] = value
            continue
        whole = value.detach().float()
        # A row of zeros has no scale to find.
        scale = whole.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        rounded[name], rounded[name + _SCALE] = (whole / scale).round().to(torch.int8), scale
    return rounded


def dequantize(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo [`quantize`]: matrices in 8 bits become float32, everything else stays as it is.

    Raises:
        ValueError: The scale of a matrix has another shape.
    """
    restored: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        scale = weights.get(name + _SCALE)
        if scale is not None and value.dtype == torch.int8:
            if scale.shape != (*value.shape[:-1], 1):
                raise ValueError(
                    f"The checkpoint is damaged: the scale of {name}, {tuple(value.shape)}, has the shape "
                    f"{tuple(scale.shape)}; download or save it anew."
                )
            value = value.float() * scale.float()
        elif name.endswith(_SCALE) and (owner := weights.get(name.removesuffix(_SCALE))) is not None:
            if owner.dtype == torch.int8:
                continue
        restored[name] = value
    return restored


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """Read one file, from the Hub's cache or anywhere else.

    Raises:
        ValueError: It is damaged, or a weight is not finite.
    """
    check_download(Path(path))
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{Path(path).name} is truncated or no safetensors file ({error}); download or save it anew."
        ) from error
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"The weight {name} in {Path(path).name} holds numbers that are not finite; download or save it anew."
            )
    return weights


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
                f"The checkpoint does not fit: {name} has shape {tuple(value.shape)}, but the configuration and base "
                f"models ask for {tuple(expected[name].shape)}."
            )


def check_sizes(config: C2CConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse a configuration of a larger fuser than the weights are, before anything of its sizes is allocated.

    Args:
        config: From the same folder.
        weights: The saved weights.

    Raises:
        ValueError: A size cannot be that of these weights.
    """
    most = max((value.numel() for value in weights.values()), default=0)
    limits = {"num_fuser_layers": len(weights), "fuser_hidden_size": most, "fuser_intermediate_size": most}
    limits |= {"memory_rank": most, "memory_hidden_size": most}
    if config.fuser_type == "c2c_shared":
        limits |= {"shared_hidden_size": most, "shared_num_layers": most}
    for part in (config, *config.sharers):
        for name, limit in limits.items():
            value = getattr(part, name, None)
            # Those of the other mode make nothing.
            if value is not None and name.startswith("memory") == (config.mode == "memory") and value > limit:
                raise ValueError(
                    f"`{name}` is {value}, more than the saved weights hold ({limit}); save the fuser anew."
                )
    shapes = [config.receiver_layer_shapes, *(sharer.layer_shapes for sharer in config.sharers)]
    if None in shapes:
        return
    try:
        # Without memory for the weights.
        with torch.device("meta"):
            expected = fuser_state_dict(torch.nn.ModuleList(build_fusers(config)))
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"The configuration asks for a fuser that cannot be built ({error}).") from error
    check_fuser_weights({name: value for name, value in weights.items() if name.startswith("fuser.")}, expected)


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} weights ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else "none"
