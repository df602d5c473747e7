"""`SlotStore`: prepared memory slots in a folder, for an engine that loads them into its own key/value cache."""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .._files import write_file
from ..inference.prefill import LayerStates

_FORMAT = "c2c_hf.PreparedSlots.1"
_SUFFIX = ".safetensors"


class SlotSource(NamedTuple):
    """What prepared slots were computed from; an empty string where it is not known.

    Attributes:
        sharer: Fingerprint of the sharer's weights.
        text: Hash of the sharer's tokens.
        fuser: Hash of the fuser's weights and configuration.
        receiver: Fingerprint of the receiver's weights.
        dtype: Of the states.
    """

    sharer: str
    text: str
    fuser: str
    receiver: str
    dtype: str


@dataclass(frozen=True)
class PreparedSlots:
    """The beginning of a prompt in memory mode: the receiver's tokens before the slots, and the slots.

    Attributes:
        source: What they were computed from.
        input_ids: `(num_tokens,)`, the receiver's ids of both.
        layers: Per receiver layer keys, as cached, and values, `(num_key_value_heads, num_tokens, head_dim)` each.
    """

    source: SlotSource
    input_ids: torch.Tensor
    layers: LayerStates

    @property
    def key(self) -> str:
        """Their name in the store, see [`slot_key`]."""
        return slot_key(self.source, self.input_ids)


def slot_key(source: SlotSource, input_ids: torch.Tensor) -> str:
    """Name prepared slots by all that they depend on. 64 hexadecimal digits.

    Args:
        source: What they are computed from.
        input_ids: `(num_tokens,)`, the receiver's ids of the tokens before the slots, and of the slots.
    """
    return hashlib.sha256(json.dumps([_FORMAT, *source, input_ids.tolist()]).encode()).hexdigest()


class SlotStore:
    """Prepared slots in a folder, one safetensors file each.

    Files are written completely or not at all; several processes may share the folder. When it grows over its limit,
    the files that were not used for longest are removed.

    Args:
        folder: Folder of the files; made if needed.
        max_bytes: Largest size of all files together.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 8 << 30) -> None:
        self._folder, self._max_bytes = Path(folder), max_bytes
        #: Size and time of the files whose content was compared with its hash, by key.
        self._verified: dict[str, tuple[int, int]] = {}

    def __contains__(self, key: str) -> bool:
        """Say whether slots are there; they then count as used."""
        path = self._path(key)
        try:
            # The time of the last use; that of the last change is left as it is.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except FileNotFoundError:
            return False
        return True

    def save(self, slots: PreparedSlots) -> str:
        """Write slots and make room for them.

        Returns:
            Their key.

        Raises:
            ValueError: They alone are larger than the store may be.
            OSError: They cannot be written.
        """
        tensors = {"input_ids": slots.input_ids}
        for layer_idx, pair in enumerate(slots.layers):
            tensors |= {name: states for name, states in zip(_names(layer_idx), pair, strict=True)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"format": _FORMAT, "content_hash": _content_hash(tensors), **slots.source._asdict()}
        data = save(tensors, metadata)
        if len(data) > self._max_bytes:
            raise ValueError(
                f"`max_bytes` of the slot store is {self._max_bytes}, but the slots of this context alone have "
                f"{len(data)} bytes; raise it."
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._path(slots.key), data)
        self._evict(slots.key)
        return slots.key

    def input_ids(self, key: str) -> list[int]:
        """Return the receiver's ids of prepared slots and of the tokens before them, without loading states.

        Raises:
            ValueError: The file is damaged, or was made for something else.
            FileNotFoundError: There is none.
        """
        return self._open(key, 0, None).input_ids.tolist()

    def load(self, key: str, start: int = 0) -> PreparedSlots:
        """Load slots.

        Args:
            key: Their name.
            start: First token whose states are loaded.

        Raises:
            ValueError: The file is damaged, or was made for something else.
            FileNotFoundError: There is none.
        """
        if key in self:
            self._verify(key)
        return self._open(key, start, len(self.input_ids(key)))

    def _path(self, key: str) -> Path:
        # A key of a request is not trusted with a path of its own.
        if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
            raise ValueError(f"`c2c_slots` must be a key of 64 hexadecimal digits, but got {key!r:.80}.")
        return self._folder / f"{key}{_SUFFIX}"

    def _verify(self, key: str) -> None:
        """Compare a file's content with its hash, once per process."""
        stat = self._path(key).stat()
        seen = (stat.st_size, stat.st_mtime_ns)
        if self._verified.get(key) == seen:
            return
        with _opened(self._path(key)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found, expected = _content_hash(tensors), (file.metadata() or {}).get("content_hash")
        if found != expected:
            raise ValueError(f"The prepared slots {self._path(key).name} are damaged; delete the file.")
        self._verified[key] = seen

    def _open(self, key: str, start: int, end: int | None) -> PreparedSlots:
        """Open a file; `end=None`: without states."""
        path = self._path(key)
        try:
            with _opened(path) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"format {metadata.get('format')!r}")
                source = SlotSource(*(metadata[field] for field in SlotSource._fields))
                input_ids, layers = file.get_tensor("input_ids"), []
                for layer_idx in range((len(file.keys()) - 1) // 2 if end is not None else 0):
                    keys, values = (file.get_slice(name)[:, start:end] for name in _names(layer_idx))
                    layers.append((keys, values))
        except FileNotFoundError:
            raise FileNotFoundError(f"There are no prepared slots {key} in {str(self._folder)!r}.") from None
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"The prepared slots {path.name} are damaged ({error}); delete the file.") from error
        slots = PreparedSlots(source, input_ids, layers)
        if slots.key != key:
            raise ValueError(f"The file {path.name} holds the prepared slots of something else; delete it.")
        return slots

    def _evict(self, kept: str) -> None:
        files = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                # Another process has just removed it.
                continue
            files.append((stat.st_atime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            if path.stem != kept:
                path.unlink(missing_ok=True)
                total -= size


def _names(layer_idx: int) -> tuple[str, str]:
    return f"layers.{layer_idx}.keys", f"layers.{layer_idx}.values"


def _opened(path: Path) -> safe_open:
    # A damaged file of length 0 is another error on some systems.
    if path.is_file() and path.stat().st_size < 8:
        raise SafetensorError("the file is empty")
    return safe_open(path, framework="pt")


def _content_hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
