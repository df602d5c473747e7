"""`C2CDataCollator`: tokenized examples -> one training batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..alignment.padding import pad_token_id
from ..inference.prefill import last_positions
from ..inference.sharer_cache import SharerCache
from ..processing_c2c import C2CProcessor
from .tokenization import EXAMPLE_COLUMNS, SHARER_COLUMNS


class C2CDataCollator:
    """Pads examples to a batch: prompts on the left, answers on the right, so that all rows have one boundary.

    Args:
        processor: The pair's; its pad tokens are used, and [`C2CTrainer`] tokenizes raw rows with it.
    """

    def __init__(self, processor: C2CProcessor) -> None:
        self.processor = processor
        self.pad_token_id = pad_token_id(processor.tokenizer)
        self.sharer_pad_token_ids = [pad_token_id(tokenizer) for tokenizer in processor.sharer_tokenizers]

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor | list[torch.Tensor] | int]:
        """Make a batch of examples.

        Args:
            examples: Each an [`~training.tokenization.Example`], as [`~training.dataset.prepare_dataset`] makes them.

        Returns:
            `input_ids`, `attention_mask` and `labels` (-100 at prompts and at padding), all `(batch_size,
            seq_len)`; `sharer_input_ids` and `sharer_attention_mask`, `(batch_size, sharer_seq_len)`, and
            `sharer_alignment`, `(batch_size, seq_len)`, with several sharers lists; `logits_to_keep`, the number of
            last positions that predict an answer, plus one. Of multiple choice also `wrong_answer_ids`, `(num_wrong,
            length)`, padded with -100, and `wrong_answer_rows`, `(num_wrong,)`: the batch row of each. Where there are
            rows that continue their context, `is_continuation`, `(batch_size,)`.

        Raises:
            ValueError: The rows are no examples, or a Trainer removed columns.
        """
        if missing := sorted(EXAMPLE_COLUMNS - set(examples[0])):
            raise ValueError(
                f"`examples` lack {missing}: tokenize rows with `prepare_dataset` of `c2c_hf.training.dataset`, and "
                "pass `remove_unused_columns=False` to a Trainer that is not `C2CTrainer`."
            )
        prompts = [torch.as_tensor(example["input_ids"]) for example in examples]
        answers = [torch.as_tensor(example["answer_ids"]) for example in examples]
        answer_labels = [
            ids.masked_fill(~torch.as_tensor(example.get("is_target", [True] * len(ids)), dtype=torch.bool), -100)
            for ids, example in zip(answers, examples, strict=True)
        ]
        prompt_mask, answer_mask = ([torch.ones_like(ids) for ids in part] for part in (prompts, answers))
        prompt_labels = [torch.full_like(ids, -100) for ids in prompts]
        answer_length = max(map(len, answers))
        batch: dict[str, torch.Tensor | list[torch.Tensor] | int] = {
            "input_ids": _join(prompts, answers, self.pad_token_id),
            "attention_mask": _join(prompt_mask, answer_mask, 0),
            "labels": _join(prompt_labels, answer_labels, -100),
        }
        no_answer = torch.full((len(examples), answer_length), -1)
        sharers: list[list[torch.Tensor]] = [[], [], []]
        for index, fill_id in enumerate(self.sharer_pad_token_ids):
            ids, mask, alignment = (
                [torch.as_tensor(example[name][index]) for example in examples] for name in SHARER_COLUMNS
            )
            width = max(map(len, ids))
            shifted = [
                torch.where(positions < 0, -1, positions + width - len(row))
                for positions, row in zip(alignment, ids, strict=True)
            ]
            sharers[0].append(_pad(ids, fill_id))
            sharers[1].append(_pad(mask, 0))
            sharers[2].append(torch.cat([_pad(shifted, -1), no_answer], dim=1))
        batch.update(
            (name, tensors if len(tensors) > 1 else tensors[0])
            for name, tensors in zip(SHARER_COLUMNS, sharers, strict=True)
        )
        batch["logits_to_keep"] = answer_length + 1
        if any(example.get("is_continuation") for example in examples):
            batch["is_continuation"] = torch.tensor([bool(example.get("is_continuation")) for example in examples])
        wrong = [(row, ids) for row, example in enumerate(examples) for ids in example.get("wrong_answer_ids", ())]
        if wrong:
            batch["wrong_answer_rows"] = torch.tensor([row for row, _ in wrong])
            batch["wrong_answer_ids"] = _pad([torch.as_tensor(ids) for _, ids in wrong], -100, left=False)
        return batch


@dataclass
class TrainingBatch:
    """A batch of [`C2CDataCollator`] with one tensor per sharer, however many there are.

    Attributes:
        input_ids: `(batch_size, seq_len)`.
        attention_mask: `(batch_size, seq_len)`.
        labels: `(batch_size, seq_len)`, -100 at prompts and at padding.
        logits_to_keep: Number of last positions whose logits are needed. 0: all.
        sharer_input_ids: Per sharer `(batch_size, sharer_seq_len)`.
        sharer_attention_mask: Per sharer `(batch_size, sharer_seq_len)`.
        sharer_alignment: Per sharer `(batch_size, seq_len)`, the aligned sharer position or -1.
        sharer_caches: Per sharer the cache of its text. `None`: the sharers run.
        wrong_answer_ids: `(num_wrong, length)`, padded with -100. `None`: there are none.
        wrong_answer_rows: `(num_wrong,)`, the batch row of each.
        is_continuation: `(batch_size,)`, bool: rows that continue their context. `None`: there are none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    sharer_input_ids: list[torch.Tensor]
    sharer_attention_mask: list[torch.Tensor]
    sharer_alignment: list[torch.Tensor]
    logits_to_keep: int = 0
    sharer_caches: list[SharerCache] | None = None
    wrong_answer_ids: torch.Tensor | None = None
    wrong_answer_rows: torch.Tensor | None = None
    is_continuation: torch.Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> "TrainingBatch":
        """Convert the output of a collator, which has a tensor in place of a list for a single sharer.

        Raises:
            ValueError: It has columns that no step of the training uses.
        """
        if unknown := sorted(inputs.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"`inputs` has the unknown columns {unknown}; leave them out in the data collator.")
        lists = {name: as_list(inputs[name]) for name in SHARER_COLUMNS}
        return cls(**{**inputs, **lists})

    def select_rows(self, rows: torch.Tensor) -> "TrainingBatch":
        """Return some of the rows, which keep their columns.

        Args:
            rows: `(num_rows,)`, their numbers, on the CPU.
        """
        names = ("input_ids", "attention_mask", "labels")
        changed: dict[str, Any] = {name: _select(getattr(self, name), rows) for name in names}
        changed |= {name: [_select(tensor, rows) for tensor in getattr(self, name)] for name in SHARER_COLUMNS}
        if self.sharer_caches is not None:
            # Copies: the originals are used once more.
            changed["sharer_caches"] = [cache.copy() for cache in self.sharer_caches]
            for cache in changed["sharer_caches"]:
                cache.select_rows(rows)
        if self.is_continuation is not None:
            changed["is_continuation"] = _select(self.is_continuation, rows)
        if self.wrong_answer_rows is not None and self.wrong_answer_ids is not None:
            owners = self.wrong_answer_rows.cpu()
            kept = [(i, new) for new, row in enumerate(rows.tolist()) for i in (owners == row).nonzero().flatten()]
            changed["wrong_answer_ids"] = changed["wrong_answer_rows"] = None
            if kept:
                changed["wrong_answer_ids"] = _select(self.wrong_answer_ids, torch.tensor([int(i) for i, _ in kept]))
                changed["wrong_answer_rows"] = torch.tensor([new for _, new in kept])
        return replace(self, **changed)

    def num_targets(self) -> torch.Tensor:
        """Return the number of tokens to be learned of each row, `(batch_size,)`."""
        return (self.labels[:, 1:] != -100).sum(1)

    def prompts(self) -> "TrainingBatch":
        """Return the batch without its answers."""
        length = self.input_ids.shape[1] - self.logits_to_keep + 1
        return replace(
            self,
            input_ids=self.input_ids[:, :length],
            attention_mask=self.attention_mask[:, :length],
            labels=self.labels[:, :length],
            sharer_alignment=[alignment[:, :length] for alignment in self.sharer_alignment],
            logits_to_keep=1,
        )

    def kept_positions(self) -> torch.Tensor:
        """Return the positions whose logits are kept, as an index, see [`~inference.prefill.last_positions`]."""
        return last_positions(self.input_ids, self.logits_to_keep)

    def model_inputs(
        self, with_labels: bool = False, use_cache: bool = False, fuses: bool = True
    ) -> dict[str, object]:
        """Return the arguments of the model's `forward`.

        Args:
            with_labels: Whether `labels` are among them.
            use_cache: Whether the model returns its cache.
            fuses: Whether fusion is on. Where it is off, an index says which logits are kept.
        """
        names = ("input_ids", "attention_mask", *SHARER_COLUMNS, "logits_to_keep", "sharer_caches")
        inputs = {name: getattr(self, name) for name in names}
        if not fuses:
            inputs["logits_to_keep"] = self.kept_positions()
        return {**inputs, "use_cache": use_cache, "labels": self.labels if with_labels else None}


def as_list(value: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    """Return one tensor per sharer."""
    return value if isinstance(value, list) else [value]


def _select(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return tensor[rows.to(tensor.device)]


def _join(prompts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor], pad_value: int) -> torch.Tensor:
    return torch.cat([_pad(prompts, pad_value), _pad(answers, pad_value, left=False)], dim=1)


def _pad(rows: Sequence[torch.Tensor], value: int, left: bool = True) -> torch.Tensor:
    width = max(map(len, rows))
    pads = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
    return torch.stack([torch.nn.functional.pad(row, pad, value=value) for row, pad in zip(rows, pads, strict=True)])
