"""Closed-form maps from a sharer's states to the receiver's: a memory fuser in minutes, without a gradient."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..fusers.memory import MemoryFuser
from ..inference.memory_slots import position_free_tokens
from ..inference.prefill import read_text
from ..inference.rotary import Rotation
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .solver import RidgeReport, Sums, solve_maps
from .variance_scaling import choose_stretch

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)
#: Tokens whose products are summed up at once: adding to sums of the features' width is what costs.
_CHUNK = 4096


@torch.no_grad()
def fit_ridge(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    texts: Iterable[str],
    sharer_index: int = 0,
    alphas: Sequence[float] = ALPHAS,
    held_out_share: float = 0.1,
    max_held_out: int = 2000,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = True,
    questions: Sequence[Mapping[str, Any]] | None = None,
) -> RidgeReport:
    """Fit a memory fuser on texts that sharer and receiver both read.

    Where tokens of both end at the same character, the sharer's states are mapped to the receiver's own. Keys are
    compared free of rotary position. Texts stream: what is kept grows with the width of the features alone.
    A fuser with `memory_rank` gets the best map of that rank (reduced-rank regression); a residual network is reset.

    Args:
        model: A pair with `mode="memory"`; its fuser is overwritten.
        processor: The pair's.
        texts: Plain texts, the more like the contexts to come the better.
        sharer_index: Which sharer's fuser.
        alphas: Penalties to choose among per layer, on the tokens held out, relative to the mean variance.
        held_out_share: Share of the batches held out.
        max_held_out: Largest number of tokens held out.
        batch_size: Texts read at once.
        max_length: Tokens after which a text is cut, of each model by itself.
        progress: Show a progress bar.
        questions: Rows of `sharer_context`, `question`, `choices` and `answer`, by which the maps are stretched, see
            [`~stretching.choose_stretch`]; `None`: they stay as least squares makes them, which is too flat.

    Returns:
        How well the held-out states are predicted, before stretching.

    Raises:
        ValueError: Not in memory mode, or too few texts.
    """
    if model.config.mode != "memory":
        raise ValueError(f"`fit_ridge` needs `mode='memory'`, but the model has {model.config.mode!r}.")
    fuser: MemoryFuser = model.fuser[sharer_index]
    fuser.sharer_scales.fill_(1.0)
    # Layers that are made from the same sharer layers share what is summed over the features.
    firsts = {tuple(sources): layer_idx for layer_idx, sources in enumerate(fuser.sources)}
    windows = {sources: Sums() for sources in firsts}
    layers = [Sums() for _ in fuser.sources]

    def add(tokens: list[tuple[list[torch.Tensor], list[torch.Tensor]]], held: bool) -> None:
        sharer_tokens, receiver_tokens = (
            [torch.cat(entry) for entry in zip(*side, strict=True)] for side in zip(*tokens, strict=True)
        )
        features = {sources: fuser.features(sharer_tokens, first).float() for sources, first in firsts.items()}
        targets = [torch.cat(pair, -1).float() for pair in zip(*_halves(receiver_tokens), strict=True)]
        for sums, own, x in (
            *((windows[sources], x, x) for sources, x in features.items()),
            *((layer, y, features[tuple(s)]) for layer, y, s in zip(layers, targets, fuser.sources, strict=True)),
        ):
            if held:
                sums.held.append(own)
            else:
                sums.add(own, x)

    period, num_held_out, num_tokens, waiting = max(2, round(1 / held_out_share)), 0, 0, []
    for number, batch in enumerate(
        tqdm(_batches(texts, batch_size), desc="Fitting", unit="batch", disable=not progress)
    ):
        tokens = _read_both(model, processor, batch, sharer_index, max_length)
        count = len(tokens[0][0])
        if number % period == period - 1 and num_held_out < max_held_out:
            num_held_out += count
            add([tokens], held=True)
            continue
        num_tokens += count
        waiting.append(tokens)
        if sum(len(sharer_tokens[0]) for sharer_tokens, _ in waiting) >= _CHUNK:
            add(waiting, held=False)
            waiting = []
    if waiting:
        add(waiting, held=False)
    if num_tokens < 2 or num_held_out < 2:
        raise ValueError(
            f"`texts` must hold more than {period} batches of {batch_size} texts, so that some can be held out; give "
            "more texts or a smaller `batch_size`."
        )
    report = solve_maps(fuser, windows, layers, num_tokens, num_held_out, alphas, progress)
    if questions is not None:
        # The sums are as large as the maps.
        windows.clear()
        layers.clear()
        choose_stretch(model, processor, report, questions, sharer_index, batch_size=batch_size, progress=progress)
    return report


def _halves(entries: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return entries[: len(entries) // 2], entries[len(entries) // 2 :]


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = (text for text in texts if text.strip())
    while batch := list(islice(iterator, size)):
        yield batch


def _read_both(
    model: C2CForCausalLM, processor: C2CProcessor, texts: list[str], sharer_index: int, max_length: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return both models' states, free of position, where their tokens end at the same character."""
    receiver_rotations, *sharer_rotations = model.rotations()
    sharer_tokenizer = processor.sharer_tokenizers[sharer_index]
    start = [] if sharer_tokenizer.bos_token_id is None else [sharer_tokenizer.bos_token_id]
    sides = [
        (model.sharers[sharer_index], start, sharer_rotations[sharer_index]),
        (model.receiver, processor.sink_ids(), receiver_rotations),
    ]
    tokenizers = (sharer_tokenizer, processor.tokenizer)
    ends = [[_ends(tokenizer, text, max_length) for text in texts] for tokenizer in tokenizers]
    # Per side the rows and columns of the tokens that both have, behind what each starts with.
    places: list[tuple[list[int], list[int]]] = [([], []), ([], [])]
    for row, columns in enumerate(zip(*ends, strict=True)):
        # A character cut into several tokens counts as its last one.
        theirs, ours = ({end: column for column, end in enumerate(ends_of)} for _, ends_of in columns)
        for end in theirs.keys() & ours.keys():
            for place, column in zip(places, (theirs[end], ours[end]), strict=True):
                place[0].append(row)
                place[1].append(column)
    return tuple(  # type: ignore[return-value]
        _states(*side, [ids for ids, _ in rows], *place) for side, rows, place in zip(sides, ends, places, strict=True)
    )


def _ends(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> tuple[list[int], list[int]]:
    """Tokenize a text; return ids, and the character at which each token ends."""
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=True, max_length=max_length
    )
    return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


def _states(
    model: PreTrainedModel,
    start: list[int],
    rotations: Sequence[Rotation],
    rows: list[list[int]],
    row_places: list[int],
    columns: list[int],
) -> list[torch.Tensor]:
    """Let one model read and pick its states."""
    width = max(map(len, rows)) + len(start)
    # Padded on the right: columns stay what they are.
    ids = torch.tensor([start + row + [0] * (width - len(start) - len(row)) for row in rows])
    mask = torch.tensor([[1] * (len(start) + len(row)) + [0] * (width - len(start) - len(row)) for row in rows])
    state = read_text(model, ids, mask)
    positions = torch.arange(width).expand(ids.shape)
    in_rows, in_columns = (torch.tensor(values, dtype=torch.long) for values in (row_places, columns))
    return position_free_tokens(state, rotations, positions, in_rows, in_columns + len(start))
