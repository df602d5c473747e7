"""What frozen sharers have read of a training set, kept on disk: they read every row once, whatever the epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.absent_sharer import AbsentSharer
from ..inference.fingerprints import SharerSource, text_hash
from ..inference.prefill import SharerCache, cached_states, full_length_cache, read_text
from ..inference.state_file import StateContent, decode_states, encode_states, write_whole
from ..modeling_c2c import C2CForCausalLM
from .collator import SHARER_COLUMNS, as_list


class SharerStore:
    """Keeps sharers' states of single rows, each in a safetensors file of its own.

    A file's folder names the sharer's weights and the precision, its name the tokens. Processes may share a folder:
    files appear whole. With all rows of a run in it the sharers need not be loaded (`load_sharers=False`).

    Args:
        folder: Where the files are; it is made. A row takes as much space as the sharer's cache of its text.
        model: The pair.
        int8: Round states to 8 bits, see [`~state_file.encode_states`].

    Raises:
        ValueError: The model fuses answers as well, which sharers have to read as they come.
    """

    def __init__(self, folder: str | Path, model: C2CForCausalLM, int8: bool = False) -> None:
        if model.config.fuse_response:
            raise ValueError(
                "`sharer_cache_dir` must be None with `fuse_response=True`, where sharers read the answers too."
            )
        self._model, self._int8 = model, int8
        prints = [sharer.fingerprint for sharer in model.config.sharers]
        self._sources = [SharerSource(found) for found in prints]
        self._folders = []
        for index, sharer in enumerate(model.sharers):
            dtype = str((model.receiver if isinstance(sharer, AbsentSharer) else sharer).dtype).removeprefix("torch.")
            name = f"{prints[index] or f'sharer-{index}'}-{dtype}{'-int8' if int8 else ''}"
            self._folders.append(Path(folder) / name)

    def states(self, inputs: dict[str, Any]) -> list[SharerCache]:
        """Return what the sharers have read of a batch; rows that are not there yet are read and written.

        Args:
            inputs: A batch of [`C2CDataCollator`].

        Raises:
            ValueError: A file is damaged, or a row is missing and its sharer was left out.
        """
        ids, masks = (as_list(inputs[name]) for name in SHARER_COLUMNS[:2])
        return [self._batch(index, *text) for index, text in enumerate(zip(ids, masks, strict=True))]

    def _batch(self, index: int, ids: torch.Tensor, mask: torch.Tensor) -> SharerCache:
        real = mask.bool()
        paths = [self._path(index, row[kept]) for row, kept in zip(ids, real, strict=True)]
        missing = [row for row, path in enumerate(paths) if not path.is_file()]
        if missing:
            self._read(index, ids[missing], mask[missing], [paths[row] for row in missing])
        rows = [_load(path) for path in paths]
        cache, real = full_length_cache(), real.cpu()
        for layer_idx in range(len(rows[0])):
            pair = []
            for kind in (0, 1):
                states = [row[layer_idx][kind] for row in rows]
                heads, _, head_dim = states[0].shape[1:]
                # Nobody reads what stands at padding, but it must be finite.
                batch = torch.zeros(len(ids), mask.shape[1], heads, head_dim, dtype=states[0].dtype)
                batch[real] = torch.cat([state[0].transpose(0, 1) for state in states])
                pair.append(batch.transpose(1, 2).to(self._model.device))
            cache.update(*pair, layer_idx)
        return SharerCache(ids, mask, cache, self._sources[index])

    def _path(self, index: int, ids: torch.Tensor) -> Path:
        name = text_hash(ids[None], torch.ones_like(ids[None]))
        # Not all in one folder, which file systems like no better than people.
        return self._folders[index] / name[:2] / f"{name}.safetensors"

    def _read(self, index: int, ids: torch.Tensor, mask: torch.Tensor, paths: Sequence[Path]) -> None:
        sharer: Any = self._model.sharers[index]
        if isinstance(sharer, AbsentSharer):
            raise ValueError(
                f"`sharer_cache_dir`: {len(paths)} rows of this batch are not in {str(self._folders[index])!r}, and "
                "their sharer was left out (`load_sharers=False`); load it, or fill the folder with it first."
            )
        shapes: Any = [sharer.layer_shapes for sharer in self._model.config.sharers]
        layers = cached_states(read_text(sharer, ids, mask, num_layers=len(shapes[index])).cache)
        for row, path in enumerate(paths):
            real = mask[row].bool()
            kept, text = real.to(layers[0][0].device), ids[row][real][None]
            states = [(keys[row, :, kept][None], values[row, :, kept][None]) for keys, values in layers]
            content = StateContent(text, torch.ones_like(text), states, self._sources[index])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, encode_states(content, self._int8))


def _load(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    try:
        return decode_states(path).layers
    except ValueError as error:
        raise ValueError(f"`sharer_cache_dir`: {str(path)!r} is damaged ({error}); delete it.") from error
