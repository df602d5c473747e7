"""`SharerCache`: the key/value cache of a sharer, and its file format."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .._compat import copy_cache
from .._files import write_file
from .fingerprints import SharerSource, fingerprint, text_hash, tokenizer_hash
from .prefill import LayerStates, cached_states, full_length_cache, input_device, position_ids_from_mask, prefill
from .probe import check_padding, first_position

_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
_FORMAT = "c2c_hf.SharerCache.1"


@dataclass
class SharerCache:
    """A sharer's tokens and their key/value states.

    Attributes:
        input_ids: `(batch_size, seq_len)`, the sharer's tokens.
        attention_mask: `(batch_size, seq_len)`, 0 at padding and at tokens that the sharer does not see.
        cache: Its full-length cache.
        source: Which sharer computed it, where it comes from elsewhere.
        text: The text of a single row, for a receiver that tokenizes it, too. `None`: not kept.

    Example:
        ```python
        # On the machine of the sharer:
        sharer_cache = SharerCache.prefill(sharer, inputs["sharer_input_ids"], inputs["sharer_attention_mask"])
        message = sharer_cache.to_safetensors(int8=True)
        # On the machine of the receiver, without the sharer:
        model = C2CForCausalLM.from_pretrained("me/fuser", load_sharers=False)
        out = model.generate(**inputs, sharer_caches=SharerCache.from_safetensors(message))
        ```
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    cache: Cache
    source: SharerSource | None = None
    text: str | None = None

    @classmethod
    def prefill(
        cls,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        text: str | None = None,
        inputs_embeds: torch.Tensor | None = None,
        model_inputs: Mapping[str, Any] | None = None,
    ) -> "SharerCache":
        """Prefill a sharer for a receiver elsewhere.

        Args:
            model: The sharer.
            input_ids: `(batch_size, seq_len)`, its tokens, as the receiver's machine will have them
                (`sharer_input_ids`).
            attention_mask: `(batch_size, seq_len)`. `None`: no padding.
            tokenizer: The sharer's, whose vocabulary is then compared, too. `None`: not compared.
            revision: The commit from which the model was loaded, to be compared as well. `None`: the model's own
                record.
            text: The text of the tokens, to be kept beside them.
            inputs_embeds: `(batch_size, seq_len, hidden_size)`, prefilled in place of `input_ids`. `None`: none.
            model_inputs: Further arguments of the model, such as `pixel_values` of a vision-language model, whose
                `input_ids` hold its image tokens. `None`: none.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        sharer_cache = prefill_sharer(
            model, input_ids, attention_mask, inputs_embeds=inputs_embeds, model_inputs=model_inputs
        )
        vocabulary = None if tokenizer is None else tokenizer_hash(tokenizer)
        revision = revision or getattr(model.config, "_commit_hash", None)
        sharer_cache.source = SharerSource(fingerprint(model), revision, vocabulary)
        sharer_cache.text = text
        return sharer_cache

    def to_safetensors(self, path: str | Path | None = None, int8: bool = False) -> bytes:
        """Encode tokens, states, source and text as safetensors, as a message or a file.

        Args:
            path: Of a file to write as well, whole or not at all. `None`: none.
            int8: Round each head's state of a token to 8 bits with a scale of its own: half the size of bfloat16, a
                quarter of float32, at an error of at most 1/254 of the largest number in it.

        Returns:
            The message.
        """
        layers, source = cached_states(self.cache), self.source or SharerSource()
        tensors = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        for layer_idx, pair in enumerate(layers):
            for kind, states in zip(("keys", "values"), pair, strict=True):
                name = f"layers.{layer_idx}.{kind}"
                if int8:
                    scale = states.float().abs().amax(-1, keepdim=True) / 127
                    tensors[f"{name}.scale"] = scale
                    states = (states.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
                tensors[name] = states
        metadata = {
            "format": _FORMAT,
            "num_layers": str(len(layers)),
            "dtype": str(layers[0][0].dtype).removeprefix("torch."),
            "text_hash": text_hash(self.input_ids, self.attention_mask),
            **{field: value for field, value in source._asdict().items() if value is not None},
            **({} if self.text is None else {"text": self.text}),
        }
        data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)
        if path is not None:
            write_file(Path(path), data)
        return data

    @classmethod
    def from_safetensors(cls, data: bytes | str | Path) -> "SharerCache":
        """Decode the output of [`SharerCache.to_safetensors`], on the CPU.

        Args:
            data: The message, or the path of a file.

        Raises:
            ValueError: It is damaged, or no message of this kind.
            OSError: There is no such file.
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
                keys, values = (_decode(tensors, f"layers.{layer_idx}.{kind}", dtype) for kind in ("keys", "values"))
                if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[::2][:2] != ids.shape:
                    raise ValueError(f"keys of shape {tuple(keys.shape)} for ids of shape {tuple(ids.shape)}")
                layers.append((keys, values))
            if mask.shape != ids.shape or not layers:
                raise ValueError(f"mask of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}")
        except (SafetensorError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`data` is damaged or holds no sharer cache ({error}); send or save it anew.") from error
        if text_hash(ids, mask) != metadata.get("text_hash"):
            raise ValueError("`data` says that its states belong to another text; send or save it anew.")
        source = SharerSource(*(metadata.get(field) for field in SharerSource._fields))
        return replace(cls.from_layers(ids, mask, layers, source), text=metadata.get("text"))

    @classmethod
    def from_layers(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        layers: LayerStates,
        source: SharerSource | None = None,
    ) -> "SharerCache":
        """Build from key and value states, `(batch_size, num_heads, seq_len, head_dim)` each per layer.

        Raises:
            ValueError: A state that is not padding is not finite.
        """
        cache = full_length_cache()
        padding = (attention_mask == 0)[:, None, :, None]
        for layer_idx, (keys, values) in enumerate(layers):
            for kind, states in (("keys", keys), ("values", values)):
                if not bool((torch.isfinite(states) | padding.to(states.device)).all()):
                    raise ValueError(
                        f"The {kind} of layer {layer_idx} of a sharer cache are not finite; prefill the sharer anew."
                    )
            cache.update(keys, values, layer_idx)
        return cls(input_ids, attention_mask, cache, source)

    def copy(self) -> "SharerCache":
        """Return a copy, whose changes leave this cache as it is."""
        return replace(self, cache=copy_cache(self.cache))

    def repeat_interleave(self, repeats: int, dim: int = 0) -> "SharerCache":
        """Return a copy with every row `repeats` times, as tensors do it.

        Args:
            repeats: How often.
            dim: 0, the batch dimension; `generate` passes it.
        """
        copied = self.copy()
        if repeats > 1:
            copied.select_rows(torch.arange(len(self.input_ids)).repeat_interleave(repeats, dim))
        return copied

    def entries(self) -> list[torch.Tensor]:
        """Return every layer's keys, then every layer's values, `(batch_size, num_heads, seq_len, head_dim)` each."""
        states = cached_states(self.cache)
        return [keys for keys, _ in states] + [values for _, values in states]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep the given batch rows, as beam search reorders or repeats them."""
        rows = rows.to(self.input_ids.device)
        self.input_ids, self.attention_mask = self.input_ids[rows], self.attention_mask[rows]
        self.cache.batch_select_indices(rows)

    def crop(self, length: int) -> None:
        """Remove all positions from `length` on."""
        self.cache.crop(length - self.input_ids.shape[1])
        self.input_ids, self.attention_mask = self.input_ids[:, :length], self.attention_mask[:, :length]

    def common_prefix(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
        """Return the number of leading positions of a text that are cached in every row.

        Args:
            input_ids: `(batch_size, seq_len)`.
            attention_mask: `(batch_size, seq_len)`.
        """
        if input_ids.shape[0] != self.input_ids.shape[0]:
            return 0
        length = min(self.input_ids.shape[1], input_ids.shape[1])
        same = self.attention_mask[:, :length] == attention_mask[:, :length]
        # Ids at padding make no difference.
        same &= (self.input_ids[:, :length] == input_ids[:, :length]) | (attention_mask[:, :length] == 0)
        return int(same.all(0).long().cumprod(0).sum())


def quantization_scale(states: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the scale by which each head's state of a token is rounded to a few bits, in float32.

    Args:
        states: `(..., head_dim)`.
        bits: Per number, including the sign.

    Returns:
        `(..., 1)`, not 0.
    """
    largest = 2 ** (bits - 1) - 1
    return states.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest


def round_states(states: torch.Tensor, bits: int) -> torch.Tensor:
    """Return states rounded to a few bits, with one scale per head and token.

    Args:
        states: `(..., head_dim)`.
        bits: Per number, including the sign.

    Returns:
        In shape and dtype of `states`.
    """
    scale = quantization_scale(states, bits)
    return ((states.float() / scale).round() * scale).to(states.dtype)


def prefill_sharer(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    cached: SharerCache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    model_inputs: Mapping[str, Any] | None = None,
) -> SharerCache:
    """Prefill a sharer, or continue its cache.

    Args:
        model: The sharer.
        input_ids: `(batch_size, seq_len)`, the whole text.
        attention_mask: `(batch_size, seq_len)`.
        position_ids: `(batch_size, seq_len)`, counted from 0, or `None`: counted from the mask.
        cached: Cache of an earlier text, or `None`. It is cropped to the common prefix and continued from there.
        inputs_embeds: `(batch_size, seq_len, hidden_size)`, prefilled in place of `input_ids`; not with `cached`.
        model_inputs: Further arguments of the model, such as `pixel_values`; not with `cached`.

    Returns:
        The cache of the whole text; `cached` itself where there is a common prefix.

    Raises:
        ValueError: The model has no plain key/value cache, or cannot compute padded rows.
    """
    check_padding("sharers", model, attention_mask)
    device = input_device(model)
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    position_ids = position_ids_from_mask(attention_mask) if position_ids is None else position_ids.to(device)
    position_ids = position_ids + first_position(model, "sharers")
    start = 0 if cached is None else cached.common_prefix(input_ids, attention_mask)
    if cached is None or start == 0:
        cached = SharerCache(input_ids, attention_mask, full_length_cache())
    else:
        cached.crop(start)
        cached.input_ids, cached.attention_mask = input_ids, attention_mask
    if start < input_ids.shape[1]:
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds.to(device)
        prefill(
            *(model, cached.cache, input_ids[:, start:], attention_mask, position_ids[:, start:]),
            inputs_embeds=inputs_embeds,
            model_inputs=model_inputs,
        )
    return cached


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata, which `load` checks but does not return."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})


def _decode(tensors: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    states, scale = tensors[name], tensors.get(f"{name}.scale")
    return states.to(dtype) if scale is None else (states.float() * scale).to(dtype)
