"""States of sharer and receiver at the same tokens, and what a fuser makes of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from ..alignment.token_table import decode_each
from ..fitting.ridge import aligned_states
from ..fusers.c2c import C2CFuser, FuserPart
from ..fusers.memory import MemoryFuser
from ..inference.fusion import TokenStates, aligned_tokens
from ..inference.sharer_cache import prefill_sharer
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor

#: What the receiver is asked about a context, where its attention to memory slots is measured.
QUESTION = "What is this text about?"
#: Contexts that are prefilled at once.
BATCH_SIZE = 8


@dataclass
class FuserStates:
    """States of the fused tokens of some texts, for one sharer.

    An entry is a receiver layer's keys; after all layers' keys come all layers' values. Each is
    `(num_tokens, num_heads * head_dim)` in float32. Keys are as cached in fusion mode, and free of rotary position in
    memory mode.

    Attributes:
        receiver: The receiver's own states.
        sharer: Those of the sharer layer that an entry is fused with; in memory mode of the middle one of the several
            that it is mapped from. `None` where the gate is closed.
        projected: The projection; `None` where the gate is closed.
        fused: What the receiver attends to: its own states and the weighted projection, in memory mode the projection.
        weights: Per entry the dynamic weights of the tokens, the mean over heads, `(num_tokens,)`, 0 where the gate
            is closed; `None` in memory mode, which has none.
        token_ids: `(num_tokens,)`, the receiver's tokens.
        lengths: Number of tokens of each text.
        texts: The texts; in fusion mode without those that have no fused token.
    """

    receiver: list[torch.Tensor]
    sharer: list[torch.Tensor | None]
    projected: list[torch.Tensor | None]
    fused: list[torch.Tensor]
    weights: list[torch.Tensor] | None
    token_ids: torch.Tensor
    lengths: list[int]
    texts: list[str]

    @property
    def num_layers(self) -> int:
        """Number of receiver layers."""
        return len(self.receiver) // 2

    @classmethod
    def join(cls, parts: "Sequence[FuserStates]") -> "FuserStates":
        """Join the states of several texts."""

        def joined(name: str) -> list[Any]:
            entries = zip(*(getattr(part, name) for part in parts), strict=True)
            return [None if entry[0] is None else torch.cat(entry) for entry in entries]

        has_weights = parts[0].weights is not None
        return cls(
            *(joined(name) for name in ("receiver", "sharer", "projected", "fused")),
            weights=joined("weights") if has_weights else None,
            token_ids=torch.cat([part.token_ids for part in parts]),
            lengths=[length for part in parts for length in part.lengths],
            texts=[text for part in parts for text in part.texts],
        )


@torch.no_grad()
def collect_states(
    model: C2CForCausalLM, processor: C2CProcessor, texts: Sequence[str], max_length: int = 512
) -> list[FuserStates]:
    """Run a pair over texts and collect the states of the tokens that are fused.

    Args:
        model: The pair.
        processor: Its processor.
        texts: Plain texts; in memory mode contexts.
        max_length: Tokens after which a text is cut.

    Returns:
        One for each sharer.

    Raises:
        ValueError: No token of the texts is fused.
    """
    if model.config.mode == "memory":
        batches = [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
        parts = [_slot_states(model, processor, batch, max_length) for batch in batches]
    else:
        collected = (_fused_states(model, processor, text, max_length) for text in texts)
        parts = [part for part in collected if part is not None]
    if not parts:
        raise ValueError("No token of the texts is fused: every gate is closed, or the texts are too short.")
    return [FuserStates.join(own) for own in zip(*parts, strict=True)]


def _slot_states(
    model: C2CForCausalLM, processor: C2CProcessor, texts: Sequence[str], max_length: int
) -> list[FuserStates]:
    collected = []
    for index, fuser in enumerate(cast(Sequence[MemoryFuser], model.fuser)):
        states = aligned_states(model, processor, texts, index, max_length)
        slots = fuser(states.sharer, states.embeddings)
        projected = [own.flatten(1).float().cpu() for kind in zip(*slots, strict=True) for own in kind]
        middle = [sources[len(sources) // 2] for sources in fuser.source_layers]
        sources = [*middle, *(len(states.sharer) // 2 + layer_idx for layer_idx in middle)]
        collected.append(
            FuserStates(
                receiver=[own.float().cpu() for own in states.receiver],
                sharer=[states.sharer[source].float().cpu() for source in sources],
                projected=list(projected),
                fused=projected,
                weights=None,
                token_ids=states.token_ids.cpu(),
                lengths=torch.bincount(states.rows, minlength=len(texts)).tolist(),
                texts=list(texts),
            )
        )
    return collected


def _fused_states(
    model: C2CForCausalLM, processor: C2CProcessor, text: str, max_length: int
) -> list[FuserStates] | None:
    inputs = processor(text, truncation=True, max_length=max_length).to(model.device)
    fusers = cast(Sequence[C2CFuser], model.fuser)
    recorders = [_Recorder() for _ in fusers]
    with _all_recording(fusers, recorders):
        model(**inputs, logits_to_keep=1)
    if not all(recorder.projected for recorder in recorders):
        return None
    unfused = prefill_sharer(model.receiver, inputs["input_ids"], inputs["attention_mask"]).entries()
    alignments = inputs["sharer_alignment"]
    collected = []
    for recorder, alignment in zip(
        recorders, alignments if isinstance(alignments, list) else [alignments], strict=True
    ):
        rows, columns, _ = aligned_tokens(alignment.cpu())
        receiver = [states.float().cpu() for states in TokenStates(unfused, rows, columns).all_entries()]
        entries, closed = range(len(receiver)), torch.zeros(len(columns))
        collected.append(
            FuserStates(
                receiver=receiver,
                sharer=[recorder.sharer.get(entry) for entry in entries],
                projected=[recorder.projected.get(entry) for entry in entries],
                fused=[receiver[entry] + recorder.changes.get(entry, 0) for entry in entries],
                weights=[recorder.weights.get(entry, closed) for entry in entries],
                token_ids=inputs["input_ids"].cpu()[0, columns],
                lengths=[len(columns)],
                texts=[text],
            )
        )
    return collected


@dataclass
class _Recorder:
    """What one fuser gets and returns in one prefill, by entry."""

    sharer: dict[int, torch.Tensor] = field(default_factory=dict)
    projected: dict[int, torch.Tensor] = field(default_factory=dict)
    changes: dict[int, torch.Tensor] = field(default_factory=dict)
    weights: dict[int, torch.Tensor] = field(default_factory=dict)
    _last: dict[str, torch.Tensor] = field(default_factory=dict)

    def keep_projection(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        self._last["projected"] = output

    def keep_weight(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        self._last["weights"] = torch.sigmoid(output.float()).mean(-1)

    def keep_part(
        self, module: nn.Module, inputs: tuple[FuserPart, torch.Tensor, torch.Tensor], output: torch.Tensor
    ) -> None:
        part, sharer_states, _ = inputs
        for name, states in (("sharer", sharer_states), ("changes", output), *self._last.items()):
            getattr(self, name).update(zip(part.entries, states.float().cpu().clone(), strict=True))


@contextmanager
def _all_recording(fusers: Sequence[C2CFuser], recorders: Sequence[_Recorder]) -> Iterator[None]:
    hooks = []
    for fuser, recorder in zip(fusers, recorders, strict=True):
        hooks.append(fuser.register_forward_hook(recorder.keep_part))
        for group in fuser.groups:
            hooks.append(group.projector.out_proj.register_forward_hook(recorder.keep_projection))
            hooks.append(group.projector.weight_proj.register_forward_hook(recorder.keep_weight))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class SlotAttention:
    """How the receiver's attention is spread, per layer the mean over heads and over the tokens behind the slots.

    Attributes:
        slots: Share that goes to the slots.
        sink: Share that goes to the tokens before them.
        prompt: Share that goes to the tokens behind them.
        prefilled: Share that goes to the context where the receiver prefills it itself, `None` on the sharer's grid,
            where it does not have the context's tokens.
        by_slot: `(num_layers, num_slots)`, the share of each slot.
        prefilled_by_slot: The same where the receiver prefills the context, or `None`.
        tokens: The slots' tokens as text, empty on the sharer's grid.
    """

    slots: list[float]
    sink: list[float]
    prompt: list[float]
    prefilled: list[float] | None
    by_slot: torch.Tensor
    prefilled_by_slot: torch.Tensor | None
    tokens: list[str]


@torch.no_grad()
def slot_attention(model: C2CForCausalLM, processor: C2CProcessor, text: str) -> SlotAttention:
    """Measure which share of the receiver's attention goes to the memory slots of a text.

    The receiver is asked [`QUESTION`] and computes its attention in full (`attn_implementation="eager"`) meanwhile.

    Args:
        model: A pair with `mode="memory"`.
        processor: Its processor.
        text: The context.
    """
    if processor.tokenizer.chat_template is None:
        inputs = processor(QUESTION, sharer_context=text)
    else:
        chat = [{"role": "user", "content": QUESTION}]
        inputs = cast(Any, processor.apply_chat_template(chat, sharer_context=text))
    inputs = inputs.to(model.device)
    alignments = inputs["sharer_alignment"]
    alignments = alignments if isinstance(alignments, list) else [alignments]
    slots = torch.stack([alignment[0] >= 0 for alignment in alignments]).any(0)
    num_queries = len(slots) - int(slots.nonzero().max()) - 1
    implementation = model.receiver.config._attn_implementation
    model.receiver.set_attn_implementation("eager")
    try:
        outputs = model(**inputs, output_attentions=True, logits_to_keep=1)
        attentions = _mean_attention(outputs.attentions, num_queries)
        prefilled = None
        if processor.memory_grid == "receiver":
            own = model.receiver(input_ids=inputs["input_ids"], output_attentions=True).attentions
            prefilled = _mean_attention(own, num_queries)[:, slots].cpu()
    finally:
        model.receiver.set_attn_implementation(implementation)
    before = torch.arange(len(slots)).to(slots.device) < int(slots.int().argmax())
    ids = inputs["input_ids"][0, slots].tolist() if processor.memory_grid == "receiver" else []
    return SlotAttention(
        slots=attentions[:, slots].sum(1).tolist(),
        sink=attentions[:, before].sum(1).tolist(),
        prompt=attentions[:, ~slots & ~before].sum(1).tolist(),
        prefilled=None if prefilled is None else prefilled.sum(1).tolist(),
        by_slot=attentions[:, slots].cpu(),
        prefilled_by_slot=prefilled,
        tokens=decode_each(processor.tokenizer, ids),
    )


def _mean_attention(attentions: Sequence[torch.Tensor], num_queries: int) -> torch.Tensor:
    """Return `(num_layers, seq_len)`, the mean over heads and over the last `num_queries` tokens."""
    return torch.stack([layer[0, :, -num_queries:].float().mean((0, 1)) for layer in attentions])
