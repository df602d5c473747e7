"""`C2CDataCollator`: tokenized examples of a pair to one training batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..processing_c2c import C2CProcessor

#: What an example holds for its sharers, one entry per sharer.
SHARER_COLUMNS = ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment")


class C2CDataCollator:
    """Pads examples to a batch: prompts on the left, answers on the right, so that one boundary serves all rows.

    Args:
        processor: The pair's; its pad tokens are used.
    """

    def __init__(self, processor: C2CProcessor) -> None:
        self.pad_token_id = _pad_token_id(processor.tokenizer)
        self.sharer_pad_token_ids = [_pad_token_id(sharer) for sharer in processor.sharer_tokenizers]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of the examples that [`~training_data.prepare_dataset`] makes.

        Returns:
            `input_ids`, `attention_mask` and `labels` (-100 in front of the answer and at padding), all `(batch_size,
            seq_len)`; `sharer_input_ids` and `sharer_attention_mask`, `(batch_size, sharer_len)`, and
            `sharer_alignment`, `(batch_size, seq_len)`, with several sharers lists; `logits_to_keep`, the number of
            last positions that predict an answer, plus one. Of multiple choice also `wrong_answer_ids`, `(num_wrong,
            length)`, padded with -100, and `wrong_answer_rows`, `(num_wrong,)`: whose they are.
        """
        prompts = [torch.as_tensor(example["input_ids"]) for example in examples]
        answers = [torch.as_tensor(example["answer_ids"]) for example in examples]
        answer_length = max(map(len, answers))
        masks = [[torch.ones_like(ids) for ids in part] for part in (prompts, answers)]
        joined = {
            "input_ids": (_pad(prompts, self.pad_token_id), _pad(answers, self.pad_token_id, left=False)),
            "attention_mask": (_pad(masks[0], 0), _pad(masks[1], 0, left=False)),
            "labels": (_pad([torch.full_like(ids, -100) for ids in prompts], -100), _pad(answers, -100, left=False)),
        }
        batch: dict[str, Any] = {name: torch.cat(parts, dim=1) for name, parts in joined.items()}
        no_answer = torch.full((len(examples), answer_length), -1)
        sharers: list[list[torch.Tensor]] = [[], [], []]
        for index, pad_token_id in enumerate(self.sharer_pad_token_ids):
            ids, mask, alignment = (
                [torch.as_tensor(example[name][index]) for example in examples] for name in SHARER_COLUMNS
            )
            width = max(map(len, ids))
            moved = [
                torch.where(read < 0, -1, read + width - len(row)) for read, row in zip(alignment, ids, strict=True)
            ]
            sharers[0].append(_pad(ids, pad_token_id))
            sharers[1].append(_pad(mask, 0))
            sharers[2].append(torch.cat([_pad(moved, -1), no_answer], dim=1))
        batch.update(
            (name, tensors if len(tensors) > 1 else tensors[0])
            for name, tensors in zip(SHARER_COLUMNS, sharers, strict=True)
        )
        batch["logits_to_keep"] = answer_length + 1
        wrong = [(row, ids) for row, example in enumerate(examples) for ids in example.get("wrong_answer_ids", ())]
        if wrong:
            batch["wrong_answer_rows"] = torch.tensor([row for row, _ in wrong])
            batch["wrong_answer_ids"] = _pad([torch.as_tensor(ids) for _, ids in wrong], -100, left=False)
        return batch


def _pad(rows: Sequence[torch.Tensor], value: int, left: bool = True) -> torch.Tensor:
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    return torch.stack([torch.nn.functional.pad(row, pad, value=value) for row, pad in zip(rows, pads, strict=True)])


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # The mask decides; any id serves where a pad token is missing.
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def random_spans(alignment: torch.Tensor | list[torch.Tensor], share_min: float) -> Any:
    """Keep one random contiguous share of the positions that fuse, in every row apart.

    Args:
        alignment: `(batch_size, seq_len)`, or one per sharer, which keep the same positions.
        share_min: The share is drawn between this and 1; of a row that fuses, at least one position stays.

    Returns:
        The same, with -1 elsewhere.
    """
    fused = torch.stack([read >= 0 for read in as_list(alignment)]).any(0)
    counts = fused.sum(1)
    # Drawn on the CPU, whose generator state every checkpoint holds.
    shares, places = torch.rand(2, len(counts)).to(counts.device)
    kept = (counts * (share_min + (1 - share_min) * shares)).round().long().clamp_min(1)
    starts = ((counts - kept + 1).clamp_min(0) * places).long()
    ranks = fused.cumsum(1) - 1
    inside = (ranks >= starts.unsqueeze(1)) & (ranks < (starts + kept).unsqueeze(1))
    spans = [read.masked_fill(~inside, -1) for read in as_list(alignment)]
    return spans if isinstance(alignment, list) else spans[0]


def other_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """Give every row the sharer texts of the next row, the last one those of the first.

    The k-th position that fuses reads what the other row's k-th reads, from the start again at its end.
    """
    mixed = dict(inputs)
    for name in ("sharer_input_ids", "sharer_attention_mask"):
        rolled = [value.roll(-1, 0) for value in as_list(inputs[name])]
        mixed[name] = rolled if isinstance(inputs[name], list) else rolled[0]
    alignments = []
    for alignment in as_list(inputs["sharer_alignment"]):
        mismatched = torch.full_like(alignment, -1)
        for row, other, result in zip(alignment, alignment.roll(-1, 0), mismatched, strict=True):
            places, read = (row >= 0).nonzero().flatten(), other[other >= 0]
            if len(read):
                result[places] = read[torch.arange(len(places), device=read.device) % len(read)]
        alignments.append(mismatched)
    if "sharer_caches" in inputs:
        order = torch.arange(len(alignments[0])).roll(-1)
        mixed["sharer_caches"] = [state.repeat_interleave(1) for state in inputs["sharer_caches"]]
        for state in mixed["sharer_caches"]:
            state.select_rows(order)
    mixed["sharer_alignment"] = alignments if isinstance(inputs["sharer_alignment"], list) else alignments[0]
    return mixed


def as_list(value: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    """Return one tensor per sharer."""
    return value if isinstance(value, list) else [value]
