"""What a sharer has read, as safetensors: a file or a message from one machine to another."""

import json
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .fingerprints import SharerSource, text_hash

_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
_FORMAT = "c2c_hf.SharerCache.1"


class StateContent(NamedTuple):
    """A sharer's text and states, off any cache.

    Attributes:
        input_ids: `(batch_size, seq_len)`.
        attention_mask: `(batch_size, seq_len)`.
        layers: Keys and values of every layer, `(batch_size, num_heads, seq_len, head_dim)` each.
        source: Which sharer has read.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    source: SharerSource


def encode_states(content: StateContent, int8: bool = False) -> bytes:
    """Write states as safetensors.

    Args:
        content: Text and states.
        int8: Round each head's state of a token to 8 bits with a scale of its own: half the size of bfloat16, a
            quarter of float32, at an error of at most 1/254 of the largest number in it.
    """
    tensors = {"input_ids": content.input_ids, "attention_mask": content.attention_mask}
    for layer_idx, pair in enumerate(content.layers):
        for kind, states in zip(("keys", "values"), pair, strict=True):
            name = f"layers.{layer_idx}.{kind}"
            if int8:
                scale = states.float().abs().amax(-1, keepdim=True) / 127
                tensors[f"{name}.scale"] = scale
                states = (states.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
            tensors[name] = states
    metadata = {
        "format": _FORMAT,
        "num_layers": str(len(content.layers)),
        "dtype": str(content.layers[0][0].dtype).removeprefix("torch."),
        "text_hash": text_hash(content.input_ids, content.attention_mask),
        **{field: value for field, value in content.source._asdict().items() if value is not None},
    }
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, also beside other processes that write it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)


def decode_states(data: bytes | str | Path) -> StateContent:
    """Read states back, on the CPU.

    Args:
        data: The bytes, or the path of a file that holds them.

    Raises:
        ValueError: They are damaged, no states, or those of another text than they say.
    """
    content = data if isinstance(data, bytes) else Path(data).read_bytes()
    try:
        tensors = load(content)
        metadata = _metadata(content)
        if metadata.get("format") != _FORMAT:
            raise KeyError(f"format {metadata.get('format')!r}")
        dtype = _DTYPES[metadata["dtype"]]
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        layers = []
        for layer_idx in range(int(metadata["num_layers"])):
            keys, values = (_states(tensors, f"layers.{layer_idx}.{kind}", dtype) for kind in ("keys", "values"))
            if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[::2][:2] != ids.shape:
                raise ValueError(f"keys of shape {tuple(keys.shape)} for ids of shape {tuple(ids.shape)}")
            layers.append((keys, values))
        if mask.shape != ids.shape or not layers:
            raise ValueError(f"mask of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}")
    except (SafetensorError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`data` is damaged or holds no sharer's states ({error}); send or save them anew."
        ) from error
    if text_hash(ids, mask) != metadata.get("text_hash"):
        raise ValueError("`data` says that its states are those of another text; send or save it anew.")
    return StateContent(ids, mask, layers, SharerSource(*(metadata.get(field) for field in SharerSource._fields)))


def _metadata(content: bytes) -> dict[str, str]:
    """Read what `load` has checked but does not return."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})


def _states(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    states, scale = tensors[name], tensors.get(f"{name}.scale")
    return states.to(dtype) if scale is None else (states.float() * scale).to(dtype)
