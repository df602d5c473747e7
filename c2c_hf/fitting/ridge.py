"""`fit_ridge`: closed-form maps from a sharer's states to the receiver's, without gradients."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TypeAlias

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from ..fusers.memory import MemoryFuser
from ..inference.fusion import KeyPositions, TokenStates
from ..inference.inputs import ReceiverInputs
from ..inference.memory_slots import slot_embeddings
from ..inference.prefill import position_ids_from_mask
from ..inference.rotary import Rotation
from ..inference.sharer_cache import prefill_sharer
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .solver import (
    MapSums,
    RidgeReport,
    choose_source_layers,
    layer_targets,
    mean_and_scale,
    score_source_layers,
    solve_maps,
)

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)
#: Tokens that are added to the sums at once: an addition costs as much for few tokens as for many.
_CHUNK_TOKENS = 4096

#: `(num_tokens, heads * head_dim)` per entry: every layer's keys, free of position, then every layer's values.
Entries: TypeAlias = list[torch.Tensor]


@dataclass
class AlignedStates:
    """States of the same tokens of contexts, of both models.

    Attributes:
        sharer: The sharer's entries.
        receiver: The receiver's entries.
        embeddings: The receiver's token embeddings, `(num_tokens, embedding_size)`; of width 0 for a fuser without.
        token_ids: The receiver's tokens, `(num_tokens,)`.
        rows: Which text of its batch a token is of, `(num_tokens,)`.
    """

    sharer: Entries
    receiver: Entries
    embeddings: torch.Tensor
    token_ids: torch.Tensor
    rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.embeddings)

    def beginning(self, num_tokens: int) -> "AlignedStates":
        """Return the first tokens."""
        sharer, receiver = ([entry[:num_tokens] for entry in entries] for entries in (self.sharer, self.receiver))
        own = (self.embeddings, self.token_ids, self.rows)
        return AlignedStates(sharer, receiver, *(part[:num_tokens] for part in own))

    @classmethod
    def join(cls, parts: "Sequence[AlignedStates]") -> "AlignedStates":
        """Join states of several batches."""
        return cls(
            [torch.cat(entry) for entry in zip(*(part.sharer for part in parts), strict=True)],
            [torch.cat(entry) for entry in zip(*(part.receiver for part in parts), strict=True)],
            torch.cat([part.embeddings for part in parts]),
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.rows for part in parts]),
        )


@torch.no_grad()
def fit_ridge(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    texts: Iterable[str],
    sharer_index: int = 0,
    alphas: Sequence[float] = ALPHAS,
    choose_layers: bool = True,
    num_selection_tokens: int = 8192,
    held_out_share: float = 0.1,
    max_held_out: int = 4000,
    batch_size: int = 8,
    max_length: int = 512,
    progress: bool = True,
) -> RidgeReport:
    """Fit a memory fuser by ridge regression on texts that sharer and receiver both prefill.

    Each token of a text in its place in front of a prompt is a sample: the receiver's states there are predicted from
    those of the sharer token that would fill its slot on the receiver's grid. Keys are compared free of rotary
    position. Texts are streamed: memory grows with the width of the features, not with the texts. A fuser with
    `memory_rank` gets the best map of that rank (reduced-rank regression); a residual network is reset. The processes
    that `accelerate launch` or `torchrun` starts share the texts, and all end with the fuser of all texts.

    Args:
        model: A pair with `mode="memory"`; its fuser is replaced.
        processor: The pair's.
        texts: Plain texts, the more like the later contexts the better.
        sharer_index: Which sharer's fuser.
        alphas: Penalties to choose among per layer, on the held-out tokens, relative to the mean variance.
        choose_layers: Choose each receiver layer's `memory_source_layers` source layers: those which alone predict
            held-out states best. They are written into the configuration. `False`: those of the fuser stay.
        num_selection_tokens: Number of first tokens by which they are chosen, and from which the fuser's means and
            scales are taken. They are held in memory.
        held_out_share: Share of the batches held out.
        max_held_out: Largest number of tokens held out.
        batch_size: Texts per batch.
        max_length: Receiver tokens after which a text is cut.
        progress: Show progress bars.

    Returns:
        How well the held-out states are predicted.

    Raises:
        ValueError: Not in memory mode, or too few texts.
    """
    if model.config.mode != "memory":
        raise ValueError(f"`fit_ridge` needs `mode='memory'`, but the model has {model.config.mode!r}.")
    processes = PartialState()
    batches = batched_texts(texts, batch_size, progress and processes.is_main_process)
    prefill = partial(aligned_states, model, processor, sharer_index=sharer_index, max_length=max_length)
    # Every process prefills the first texts, and those that are held out, so that all of them fit the same fuser.
    first = first_states(map(prefill, batches), num_selection_tokens)
    period = max(2, round(1 / held_out_share))
    too_few = ValueError(
        f"`texts` must hold more than {period} batches of {batch_size} texts, so that some can be held out; give more "
        "texts or a smaller `batch_size`."
    )
    if sum(map(len, first)) < 2:
        raise too_few
    fuser = _start_fuser(model, sharer_index, AlignedStates.join(first), choose_layers)
    sums, chunk = MapSums(fuser), []
    for number, batch in enumerate(chain(first, batches)):
        held_out = number % period == period - 1 and sums.num_held_out < max_held_out
        if not held_out and number % processes.num_processes != processes.process_index:
            continue
        part = batch if isinstance(batch, AlignedStates) else prefill(batch)
        if held_out:
            sums.hold_out(part.sharer, part.receiver, part.embeddings)
            continue
        chunk.append(part)
        if sum(map(len, chunk)) >= _CHUNK_TOKENS:
            _add(sums, chunk)
            chunk = []
    if chunk:
        _add(sums, chunk)
    if sums.num_held_out < 2:
        raise too_few
    if processes.num_processes > 1:
        # A process without a batch of its own has sums of 0, too.
        _add(sums, [first[0].beginning(0)])
        sums.add_over_processes()
    return solve_maps(fuser, sums, alphas, progress and processes.is_main_process)


def _add(sums: MapSums, chunk: Sequence[AlignedStates]) -> None:
    whole = AlignedStates.join(chunk)
    sums.add(whole.sharer, whole.receiver, whole.embeddings)


def _start_fuser(model: C2CForCausalLM, sharer_index: int, states: AlignedStates, choose_layers: bool) -> MemoryFuser:
    """Replace a fuser of the model by one that standardizes these states, with the source layers that predict best."""
    config, sharer_config, old = model.config, model.config.sharers[sharer_index], model.fuser[sharer_index]
    device = next(old.parameters()).device
    scaler = MemoryFuser(config, sharer_config).to(device)
    for name, parts in (("sharer", states.sharer), ("receiver", states.receiver), ("embedding", [states.embeddings])):
        mean, scale = getattr(scaler, f"{name}_mean"), getattr(scaler, f"{name}_scale")
        if len(mean):
            for buffer, measured in zip((mean, scale), mean_and_scale(torch.cat(parts, dim=-1).to(mean)), strict=True):
                buffer.copy_(measured)
    if choose_layers:
        entries, embeddings = scaler.standardize(states.sharer, states.embeddings)
        num_sharer_layers = len(entries) // 2
        common = [] if embeddings is None else [embeddings]
        features = (
            torch.cat([entries[layer], entries[num_sharer_layers + layer], *common], dim=-1)
            for layer in range(num_sharer_layers)
        )
        scores = score_source_layers(features, layer_targets(scaler, states.receiver))
        sharer_config.memory_source_layers = choose_source_layers(scores, config.memory_source_layers)
    fuser = MemoryFuser(config, sharer_config).to(device)
    buffers = dict(scaler.named_buffers())
    for name, buffer in fuser.named_buffers():
        buffer.copy_(buffers[name])
    model.fuser[sharer_index] = fuser.train(old.training)
    return fuser


def batched_texts(texts: Iterable[str], batch_size: int, progress: bool) -> Iterator[list[str]]:
    """Batch the texts that are not blank, with a progress bar."""
    iterator = (text for text in texts if text.strip())
    total = math.ceil(len(texts) / batch_size) if isinstance(texts, Sized) else None
    with tqdm(total=total, desc="Fitting", unit="batch", disable=not progress) as bar:
        while batch := list(islice(iterator, batch_size)):
            yield batch
            bar.update()


def first_states(states: Iterator[AlignedStates], num_tokens: int) -> list[AlignedStates]:
    """Take batches until they hold `num_tokens` tokens or end."""
    first: list[AlignedStates] = []
    while sum(map(len, first)) < num_tokens and (batch_states := next(states, None)) is not None:
        first.append(batch_states)
    return first


def aligned_states(
    model: C2CForCausalLM, processor: C2CProcessor, texts: Sequence[str], sharer_index: int, max_length: int
) -> AlignedStates:
    """Prefill both models with contexts and return the states of the receiver's tokens and of those that fill them."""
    grid = C2CProcessor(
        processor.tokenizer,
        processor.sharer_tokenizers[sharer_index],
        add_sharer_bos=processor.add_sharer_bos,
        mode="memory",
        memory_grid="receiver",
        memory_sink_tokens=processor.memory_sink_tokens,
    )
    contexts = [cut_text(processor.tokenizer, text, max_length) for text in texts]
    if grid.chat_template is None:
        batch = grid(["."] * len(contexts), sharer_context=contexts)
    else:
        chat = [{"role": "user", "content": "."}]
        batch = grid.apply_chat_template([chat] * len(contexts), sharer_context=contexts)
    return prefill_aligned(model, batch, sharer_index)


def prefill_aligned(model: C2CForCausalLM, batch: Mapping[str, torch.Tensor], sharer_index: int) -> AlignedStates:
    """Prefill both models and return the states of the aligned tokens, keys as the fuser takes them.

    Args:
        model: The pair.
        batch: Output of a processor, with the inputs of this sharer alone.
        sharer_index: Which sharer.
    """
    alignment, input_ids = batch["sharer_alignment"], batch["input_ids"]
    rows, columns = (alignment >= 0).nonzero(as_tuple=True)
    rotations = model.rotations() if model.config.needs_rotations else None
    receiver_rotations, sharer_rotations = (rotations[0], rotations[1 + sharer_index]) if rotations else (None, None)
    embedding = model.get_input_embeddings()
    sharer = _prefill_tokens(
        model.sharers[sharer_index],
        batch["sharer_input_ids"],
        batch["sharer_attention_mask"],
        sharer_rotations,
        rows,
        alignment[rows, columns],
    )
    receiver = _prefill_tokens(model.receiver, input_ids, batch["attention_mask"], receiver_rotations, rows, columns)
    device = next(model.fuser.parameters()).device
    inputs = ReceiverInputs(input_ids.to(next(embedding.parameters()).device), None, batch["attention_mask"], None)
    fuser = model.fuser[sharer_index]
    count = fuser.num_token_embeddings if isinstance(fuser, MemoryFuser) else 0
    return AlignedStates(
        [state.to(device) for state in sharer],
        [state.to(device) for state in receiver],
        slot_embeddings(inputs, embedding, rows, columns, count).to(device) if count else torch.zeros(len(rows), 0),
        input_ids[rows, columns],
        rows,
    )


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> str:
    """Cut a text behind its first `max_length` tokens."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= max_length else text[: offsets[max_length - 1][1]]


def _prefill_tokens(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    rotations: Sequence[Rotation] | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> Entries:
    """Prefill a model and return the states of the tokens at `rows` and `columns`; `None`: keys as cached."""
    cache = prefill_sharer(model, input_ids, attention_mask)
    key_positions = None if rotations is None else KeyPositions(rotations, position_ids_from_mask(attention_mask))
    return TokenStates(cache.entries(), rows, columns, key_positions=key_positions).all_entries()
