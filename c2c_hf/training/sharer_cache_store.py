"""`SharerCacheStore`: the sharers' caches of a training set on disk, so that each row is prefilled once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..inference.fingerprints import SharerSource, text_hash
from ..inference.prefill import cached_states
from ..inference.sharer_cache import SharerCache, prefill_sharer
from ..modeling_c2c import C2CForCausalLM


class SharerCacheStore:
    """Keeps the sharers' caches of single rows, each in a safetensors file.

    A file's folder names the sharer's weights and the precision, its name is a hash of the tokens. Files are written
    completely or not at all, so that several processes can share a folder. When it holds all rows of a run, the
    sharers need not be loaded (`load_sharers=False`).

    Args:
        folder: Folder of the files; made if needed. A row takes as much space as the sharer's cache of its text.
        model: The pair.
        int8: Round states to 8 bits, see [`SharerCache.to_safetensors`].

    Raises:
        ValueError: The model has `fuse_response=True`: then the sharers also prefill the answers.
    """

    def __init__(self, folder: str | Path, model: C2CForCausalLM, int8: bool = False) -> None:
        if model.config.fuse_response:
            raise ValueError(
                "`sharer_cache_dir` must be None with `fuse_response=True`, where the sharers prefill the answers too."
            )
        self._model, self._int8 = model, int8
        self._sources = [SharerSource(sharer.fingerprint) for sharer in model.config.sharers]
        self._folders = []
        for index, sharer in enumerate(model.sharers):
            # A sharer that is not loaded has the receiver's precision.
            dtype = str((sharer if isinstance(sharer, PreTrainedModel) else model.receiver).dtype)
            parts = [self._sources[index].fingerprint or f"sharer-{index}", dtype.removeprefix("torch.")]
            self._folders.append(Path(folder) / "-".join([*parts, "int8"] if int8 else parts))

    def load(
        self, sharer_input_ids: Sequence[torch.Tensor], sharer_attention_mask: Sequence[torch.Tensor]
    ) -> list[SharerCache]:
        """Load the caches of a batch; rows without a file are prefilled and written.

        Args:
            sharer_input_ids: Per sharer `(batch_size, sharer_seq_len)`.
            sharer_attention_mask: Per sharer `(batch_size, sharer_seq_len)`.

        Returns:
            One cache per sharer, on the device of the pair.

        Raises:
            ValueError: A file is damaged, or a row has no file and its sharer is not loaded.
        """
        texts = zip(sharer_input_ids, sharer_attention_mask, strict=True)
        return [self._load_batch(index, ids, mask) for index, (ids, mask) in enumerate(texts)]

    def _load_batch(self, index: int, ids: torch.Tensor, mask: torch.Tensor) -> SharerCache:
        real = mask.bool().cpu()
        paths = [self._path(index, row[kept]) for row, kept in zip(ids.cpu(), real, strict=True)]
        missing = [row for row, path in enumerate(paths) if not path.is_file()]
        if missing:
            self._prefill(index, ids[missing], mask[missing], [paths[row] for row in missing])
        rows = [cached_states(_load_row(path).cache) for path in paths]
        layers = []
        for layer_idx in range(len(rows[0])):
            keys, values = (
                _pad_rows([row[layer_idx][kind] for row in rows], real).to(self._model.device) for kind in (0, 1)
            )
            layers.append((keys, values))
        return SharerCache.from_layers(ids, mask, layers, self._sources[index])

    def _path(self, index: int, ids: torch.Tensor) -> Path:
        name = text_hash(ids[None], torch.ones_like(ids[None]))
        # Folders of many thousand files are slow on most file systems.
        return self._folders[index] / name[:2] / f"{name}.safetensors"

    def _prefill(self, index: int, ids: torch.Tensor, mask: torch.Tensor, paths: Sequence[Path]) -> None:
        """Prefill a sharer with rows, `(num_rows, sharer_seq_len)`, and write each row's cache."""
        sharer = self._model.sharers[index]
        if not isinstance(sharer, PreTrainedModel):
            raise ValueError(
                f"`sharer_cache_dir`: {len(paths)} rows of this batch are not in {str(self._folders[index])!r}, and "
                "their sharer was left out (`load_sharers=False`); load it, or fill the folder with it first."
            )
        layers = cached_states(prefill_sharer(sharer, ids, mask).cache)
        for row, path in enumerate(paths):
            real = mask[row].bool()
            text, kept = ids[row][real][None], real.to(layers[0][0].device)
            states = [(keys[row, :, kept][None], values[row, :, kept][None]) for keys, values in layers]
            path.parent.mkdir(parents=True, exist_ok=True)
            cache = SharerCache.from_layers(text, torch.ones_like(text), states, self._sources[index])
            cache.to_safetensors(path, int8=self._int8)


def _load_row(path: Path) -> SharerCache:
    try:
        return SharerCache.from_safetensors(path)
    except ValueError as error:
        raise ValueError(f"`sharer_cache_dir`: {str(path)!r} is damaged ({error}); delete it.") from error


def _pad_rows(rows: Sequence[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
    """Batch the states of single rows.

    Args:
        rows: `(1, num_heads, num_tokens, head_dim)` each.
        real: `(batch_size, seq_len)`, bool, where each row's tokens are.

    Returns:
        `(batch_size, num_heads, seq_len, head_dim)`; 0 at padding, which must be finite.
    """
    _, heads, _, head_dim = rows[0].shape
    batch = rows[0].new_zeros(*real.shape, heads, head_dim)
    batch[real] = torch.cat([states[0].transpose(0, 1) for states in rows])
    return batch.transpose(1, 2)
