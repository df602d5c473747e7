"""`fit_ridge`: closed-form maps from a sharer's states to the receiver's, without gradients."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..fusers.memory import MemoryFuser
from ..inference.memory_slots import position_free_tokens
from ..inference.rotary import Rotation
from ..inference.sharer_cache import prefill_sharer
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .solver import RidgeReport, TokenSums, solve_maps
from .variance_scaling import choose_variance_scale

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)
#: Tokens that are added to the sums at once: an addition costs as much for few tokens as for many.
_CHUNK_TOKENS = 4096

#: `(num_tokens, heads * head_dim)` per entry: every layer's keys, free of position, then every layer's values.
Entries: TypeAlias = list[torch.Tensor]


class AlignedStates(NamedTuple):
    """States of the same tokens of both models.

    Attributes:
        sharer: The sharer's entries.
        receiver: The receiver's entries.
    """

    sharer: Entries
    receiver: Entries


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
    """Fit a memory fuser by ridge regression on texts that sharer and receiver both prefill.

    Where tokens of both end at the same character, the sharer's states are mapped to the receiver's. Keys are compared
    free of rotary position. Texts are streamed: memory grows with the width of the features, not with the texts.
    A fuser with `memory_rank` gets the best map of that rank (reduced-rank regression); a residual network is reset.

    Args:
        model: A pair with `mode="memory"`; its fuser is overwritten.
        processor: The pair's.
        texts: Plain texts, the more like the later contexts the better.
        sharer_index: Which sharer's fuser.
        alphas: Penalties to choose among per layer, on the held-out tokens, relative to the mean variance.
        held_out_share: Share of the batches held out.
        max_held_out: Largest number of tokens held out.
        batch_size: Texts per batch.
        max_length: Tokens after which a text is cut, of each model by itself.
        progress: Show progress bars.
        questions: Rows of `sharer_context`, `question`, `choices` and `answer`, by which the variance of the maps'
            output is scaled, see [`~fitting.variance_scaling.choose_variance_scale`]. `None`: the maps stay as least
            squares gives them, with too little variance.

    Returns:
        How well the held-out states are predicted, before variance scaling.

    Raises:
        ValueError: Not in memory mode, or too few texts.
    """
    fuser = model.fuser[sharer_index]
    if model.config.mode != "memory" or not isinstance(fuser, MemoryFuser):
        raise ValueError(f"`fit_ridge` needs `mode='memory'`, but the model has {model.config.mode!r}.")
    fuser.sharer_scales.fill_(1.0)
    sums = _LayerSums(fuser)
    period, num_held_out, num_tokens = max(2, round(1 / held_out_share)), 0, 0
    chunk: list[AlignedStates] = []
    batches = tqdm(
        _batches(texts, batch_size),
        total=math.ceil(len(texts) / batch_size) if isinstance(texts, Sized) else None,
        desc="Fitting",
        unit="batch",
        disable=not progress,
    )
    for number, batch in enumerate(batches):
        states = aligned_states(model, processor, batch, sharer_index, max_length)
        count = len(states.sharer[0])
        if number % period == period - 1 and num_held_out < max_held_out:
            num_held_out += count
            sums.hold_out(states)
            continue
        num_tokens += count
        chunk.append(states)
        if sum(len(part.sharer[0]) for part in chunk) >= _CHUNK_TOKENS:
            sums.add(chunk)
            chunk = []
    if chunk:
        sums.add(chunk)
    if num_tokens < 2 or num_held_out < 2:
        raise ValueError(
            f"`texts` must hold more than {period} batches of {batch_size} texts, so that some can be held out; give "
            "more texts or a smaller `batch_size`."
        )
    report = solve_maps(fuser, sums.features, sums.layers, num_tokens, num_held_out, alphas, progress)
    if questions is not None:
        # As large as the maps.
        del sums
        choose_variance_scale(
            model, processor, report, questions, sharer_index, batch_size=batch_size, progress=progress
        )
    return report


class _LayerSums:
    """The sums of all layers of a fuser.

    Attributes:
        features: Per tuple of sharer layers the sums over the features that they give, for all receiver layers that
            have the same.
        layers: Per receiver layer the sums over its states.
    """

    def __init__(self, fuser: MemoryFuser) -> None:
        self._fuser, device = fuser, fuser.sharer_scales.device
        # Receiver layers with the same sharer layers have the same features; one of them is as good as another.
        self._layer_of = {tuple(sources): layer_idx for layer_idx, sources in enumerate(fuser.sources)}
        widths = {
            sources: sum(fuser.entry_widths[entry] for entry in fuser.entries(layer_idx))
            for sources, layer_idx in self._layer_of.items()
        }
        self.features = {sources: TokenSums.zeros(width, width, device) for sources, width in widths.items()}
        self.layers = [
            TokenSums.zeros(widths[tuple(layer)], heads * (key_dim + value_dim), device)
            for layer, (heads, key_dim, value_dim) in zip(fuser.sources, fuser.receiver_shapes, strict=True)
        ]

    def add(self, chunk: Sequence[AlignedStates]) -> None:
        """Add tokens to the sums."""
        sharer_entries, receiver_entries = (
            [torch.cat(parts) for parts in zip(*batches, strict=True)] for batches in zip(*chunk, strict=True)
        )
        features, layers = self._split(AlignedStates(sharer_entries, receiver_entries))
        for sources, sums in self.features.items():
            sums.add(features[sources], features[sources])
        for sums, states, own_sources in zip(self.layers, layers, self._fuser.sources, strict=True):
            sums.add(states, features[tuple(own_sources)])

    def hold_out(self, states: AlignedStates) -> None:
        """Keep tokens by which the maps are evaluated."""
        features, layers = self._split(states)
        for sources, sums in self.features.items():
            sums.held_out.append(features[sources])
        for sums, layer in zip(self.layers, layers, strict=True):
            sums.held_out.append(layer)

    def _split(self, states: AlignedStates) -> tuple[dict[tuple[int, ...], torch.Tensor], list[torch.Tensor]]:
        """Return the features by sharer layers and, side by side, keys and values of each receiver layer; float32."""
        features = {
            sources: self._fuser.features(states.sharer, layer_idx).float()
            for sources, layer_idx in self._layer_of.items()
        }
        num_layers = len(states.receiver) // 2
        layers = [
            torch.cat([states.receiver[layer_idx], states.receiver[num_layers + layer_idx]], dim=-1).float()
            for layer_idx in range(num_layers)
        ]
        return features, layers


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Batch the texts that are not blank."""
    iterator = (text for text in texts if text.strip())
    while batch := list(islice(iterator, size)):
        yield batch


def aligned_states(
    model: C2CForCausalLM, processor: C2CProcessor, texts: Sequence[str], sharer_index: int, max_length: int
) -> AlignedStates:
    """Prefill both models with texts and return their states where tokens of both end at the same character."""
    receiver_rotations, *sharer_rotations = model.rotations()
    sharer_tokenizer = processor.sharer_tokenizers[sharer_index]
    sharer_start = [] if sharer_tokenizer.bos_token_id is None else [sharer_tokenizer.bos_token_id]
    receiver_start = processor.sink_ids()
    sharer_rows = [_tokenize(sharer_tokenizer, text, max_length) for text in texts]
    receiver_rows = [_tokenize(processor.tokenizer, text, max_length) for text in texts]
    rows, sharer_columns, receiver_columns = [], [], []
    for row, tokenized in enumerate(zip(sharer_rows, receiver_rows, strict=True)):
        # Of the tokens of one character the last one counts.
        sharer_ends, receiver_ends = ({end: column for column, end in enumerate(ends)} for _, ends in tokenized)
        for end in sharer_ends.keys() & receiver_ends.keys():
            rows.append(row)
            sharer_columns.append(len(sharer_start) + sharer_ends[end])
            receiver_columns.append(len(receiver_start) + receiver_ends[end])
    sharer, receiver_ids = model.sharers[sharer_index], [receiver_start + ids for ids, _ in receiver_rows]
    sharer_ids = [sharer_start + ids for ids, _ in sharer_rows]
    return AlignedStates(
        _prefill_tokens(sharer, sharer_ids, sharer_rotations[sharer_index], rows, sharer_columns),
        _prefill_tokens(model.receiver, receiver_ids, receiver_rotations, rows, receiver_columns),
    )


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> tuple[list[int], list[int]]:
    """Return the ids of a text, and the character at which each token ends."""
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=True, max_length=max_length
    )
    return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


def _prefill_tokens(
    model: PreTrainedModel,
    ids: Sequence[list[int]],
    rotations: Sequence[Rotation],
    rows: list[int],
    columns: list[int],
) -> Entries:
    """Prefill a model with `ids` and return the states of the tokens at `rows` and `columns`."""
    width = max(map(len, ids))
    # Padded on the right: columns stay the same.
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    cache = prefill_sharer(model, input_ids, attention_mask)
    position_ids = torch.arange(width).expand(input_ids.shape)
    in_rows, in_columns = (torch.tensor(values, dtype=torch.long) for values in (rows, columns))
    return position_free_tokens(cache, rotations, position_ids, in_rows, in_columns)
