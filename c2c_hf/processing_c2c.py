"""`C2CProcessor`: texts or chats -> the receiver's batch, the sharers' batches and who reads whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase

from .alignment.chat_template import Chat, Message, chat_segments, plain_messages
from .alignment.padding import BatchLayout
from .alignment.report import AlignmentReport, alignment_report
from .alignment.token_table import Segment, align_spans, apply_token_table, mask_last_position, own_bos_token_id
from .pretrained_processor import C2CPreTrainedProcessor

#: Ids and character offsets; no offsets where nothing is aligned by `span`.
Tokenized = tuple[list[int], list[tuple[int, int]]]
#: (sharer index, add BOS) -> every row's tokens and segments. Called for `span` alone.
SharerRows = Callable[[int, bool], list[tuple[Tokenized, list[Segment]]]]


class C2CProcessor(C2CPreTrainedProcessor):
    """Tokenizers of the receiver and of its sharers behind one call.

    Args:
        tokenizer: The receiver's tokenizer.
        sharer_tokenizers: One tokenizer per sharer, or a single one.
        token_alignment: `"identity"`, `"first"`, `"longest"` or `"span"`, one for all or one per sharer. Default:
            `"identity"` where the vocabularies are the same, else `"span"`.
        add_sharer_bos: Give sharers the BOS their own tokenizer writes. Off, they read as in the reference.
        mode: What becomes of `sharer_context`, see [`C2CConfig`]: `"fusion"`, or `"memory"`, where the prompt
            gets a slot for each of its tokens.
        memory_sink_tokens: Number of the prompt's tokens in front of the slots.
        unknown: Of the token tables, see [`~alignment.build_token_table`].
        partial_characters: Of the token tables as well.
        chat_template: Replaces the receiver's chat template.

    Raises:
        ValueError: For an unknown alignment, `identity` between different vocabularies, or `span` with a slow
            tokenizer, which knows no character offsets.
    """

    @property
    def model_input_names(self) -> list[str]:
        """Names of the outputs, in order."""
        return ["input_ids", "attention_mask", "sharer_input_ids", "sharer_attention_mask", "sharer_alignment"]

    def sink_ids(self) -> list[int]:
        """Return the tokens that stand in front of a memory: the first ones of the receiver's chats, or its BOS."""
        if self.chat_template is not None:
            text = str(self.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
            return self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.memory_sink_tokens]
        bos = self.tokenizer.bos_token_id
        return [] if bos is None or not self.memory_sink_tokens else [bos]

    def alignment_report(self, texts: Sequence[str], sharer_index: int = 0) -> AlignmentReport:
        """Measure one sharer's alignment on plain texts, see [`~alignment_report.alignment_report`]."""
        sharer, alignment = self.sharer_tokenizers[sharer_index], self.token_alignments[sharer_index]
        return alignment_report(self.tokenizer, sharer, texts, alignment, self.token_tables[sharer_index])

    def __call__(
        self,
        text: str | Sequence[str],
        sharer_context: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        add_sharer_bos: bool | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> BatchFeature:
        """Tokenize plain texts for the receiver and its sharers.

        Args:
            text: One text or several.
            sharer_context: Text only the sharers read, before the text: one for all, or one per text.
            return_tensors: `"pt"`, or `None` for lists.
            padding: As in a tokenizer, on the left. Default: to the longest, where tensors need it.
            truncation: Cut to `max_length` tokens, on the side of the receiver's `truncation_side`.
            max_length: Largest number of tokens, of each model by itself.
            add_special_tokens: Of the receiver.
            add_sharer_bos: Overrides the processor's `add_sharer_bos`.
            pad_to_multiple_of: Round the widths up, of the receiver's and of each sharer's batch.

        Returns:
            `input_ids` and `attention_mask`, `(batch_size, seq_len)`; `sharer_input_ids` and `sharer_attention_mask`,
            `(batch_size, sharer_seq_len)`; `sharer_alignment`, `(batch_size, seq_len)`, the sharer position each
            receiver position reads or -1. With several sharers the last three are lists. In memory mode the prompt is
            longer by its slots: the alignment names the token that fills each, and is -1 elsewhere.

        Raises:
            ValueError: For an empty list or text, contexts that do not fit, or lengths no tensor can hold.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(t, str) for t in texts):
            raise ValueError(f"`text` must be a string or a list of strings, got {text!r:.80}.")
        layout = BatchLayout(padding, max_length, pad_to_multiple_of, return_tensors)
        heads = self._heads(sharer_context, len(texts), "text")
        cut = (truncation, max_length)
        receiver = [self._tokenize(self.tokenizer, t, add_special_tokens, *cut) for t in texts]
        if self.mode == "memory":
            return self._memory_batch(receiver, heads, isinstance(text, str), layout, add_sharer_bos, cut)

        def sharer_rows(index: int, bos: bool) -> list[tuple[Tokenized, list[Segment]]]:
            return [
                (self._tokenize_sharer(index, head + t, bos, *cut), [(0, len(head), len(t))])
                for t, head in zip(texts, heads, strict=True)
            ]

        return self._batch(receiver, sharer_rows, isinstance(text, str), layout, add_sharer_bos)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        sharer_chat_template: str | Sequence[str | None] | None = None,
        sharer_context: str | Sequence[str] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = "pt",
        return_dict: bool = True,
        padding: bool | str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_sharer_bos: bool | None = None,
        pad_to_multiple_of: int | None = None,
        **template_kwargs: Any,
    ) -> BatchFeature | torch.Tensor | str | list[Any]:
        """Render chats with each model's own template, tokenize them and align the messages' contents.

        With `first`, `longest` and `identity` the sharer reads the receiver's rendered chat instead. A sharer without
        a chat template reads the contents as plain text.

        Args:
            conversation: One list of messages or several; contents are text or lists of text parts.
            chat_template: Replaces the receiver's template.
            sharer_chat_template: Replaces the sharers' templates: one for all, or one (or `None`) per sharer.
            sharer_context: Text only the sharers read, in front of the first user message: one, or one per chat.
            add_generation_prompt: End with the start of an answer. Default: yes, unless a message is continued.
            continue_final_message: Leave the last message open.
            tokenize: Return the receiver's rendered text if off.
            return_tensors: `"pt"`, or `None` for lists.
            return_dict: Return the receiver's ids alone if off.
            padding: As for texts.
            truncation: As for texts.
            max_length: As for texts.
            add_sharer_bos: Overrides the processor's `add_sharer_bos`. A BOS that a template writes stays.
            pad_to_multiple_of: As for texts.
            template_kwargs: Handed to every template: `tools`, `documents`, `enable_thinking`, ...

        Returns:
            The same outputs as for texts.

        Raises:
            ValueError: For contents that are not text, templates that refuse the chat, and as for texts.
        """
        if not len(conversation):
            raise ValueError("`conversation` is empty: give at least one message.")
        single = isinstance(conversation[0], Mapping)
        chats = [plain_messages(chat) for chat in ([conversation] if single else conversation)]  # type: ignore[arg-type]
        layout = BatchLayout(padding, max_length, pad_to_multiple_of, return_tensors)
        heads = self._heads(sharer_context, len(chats), "conversation")
        count = len(self.sharer_tokenizers)
        templates = (
            [sharer_chat_template] * count
            if isinstance(sharer_chat_template, str | None)
            else list(sharer_chat_template)
        )
        if len(templates) != count:
            raise ValueError(f"`sharer_chat_template` has {len(templates)} entries for {count} sharers.")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        template_kwargs.update(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        ours = [Chat(self.tokenizer, chat, chat_template, template_kwargs) for chat in chats]
        if not tokenize:
            return ours[0].text if single else [chat.text for chat in ours]
        cut = (truncation, max_length)
        receiver = [self._tokenize(self.tokenizer, chat.text, False, *cut) for chat in ours]
        if self.mode == "memory":
            batch = self._memory_batch(receiver, heads, single, layout, add_sharer_bos, cut)
            return batch if return_dict else batch["input_ids"]

        def sharer_rows(index: int, bos: bool) -> list[tuple[Tokenized, list[Segment]]]:
            rows = []
            sharer = self.sharer_tokenizers[index]
            for chat, own, head in zip(chats, ours, heads, strict=True):
                theirs = Chat(sharer, chat, templates[index], template_kwargs, index, head)
                tokenized = self._tokenize_sharer(index, theirs.text, bos, *cut)
                rows.append((tokenized, chat_segments(own.spans, theirs.spans)))
            return rows

        batch = self._batch(receiver, sharer_rows, single, layout, add_sharer_bos)
        return batch if return_dict else batch["input_ids"]

    def _heads(self, sharer_context: str | Sequence[str] | None, count: int, name: str) -> list[str]:
        """Return what stands before each row's text on the sharers' side."""
        if sharer_context is None:
            return [""] * count
        if set(self.token_alignments) != {"span"}:
            raise ValueError(
                f"`sharer_context` needs `token_alignment='span'`, got {self.token_alignments}: with the others a "
                "sharer reads the receiver's tokens and nothing else."
            )
        contexts = [sharer_context] * count if isinstance(sharer_context, str) else list(sharer_context)
        if len(contexts) != count:
            raise ValueError(
                f"`sharer_context` has {len(contexts)} entries for {count} in `{name}`: give one per entry."
            )
        if self.mode == "memory":
            return contexts
        return [f"{context}\n\n" if context else "" for context in contexts]

    def _tokenize(
        self, tokenizer: PreTrainedTokenizerBase, text: str, special: bool, truncation: bool, max_length: int | None
    ) -> Tokenized:
        spans = "span" in self.token_alignments
        side, tokenizer.truncation_side = tokenizer.truncation_side, self.tokenizer.truncation_side
        try:
            encoded = tokenizer(
                text,
                add_special_tokens=special,
                truncation=truncation,
                max_length=max_length if truncation else None,
                return_offsets_mapping=spans,
                return_attention_mask=False,
            )
        finally:
            tokenizer.truncation_side = side
        return encoded["input_ids"], encoded["offset_mapping"] if spans else []

    def _tokenize_sharer(
        self, index: int, text: str, bos: bool, truncation: bool, max_length: int | None
    ) -> Tokenized:
        tokenizer = self.sharer_tokenizers[index]
        # A text that writes the BOS itself (a rendered chat, say) must not get a second one.
        written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return self._tokenize(tokenizer, text, bos and not written, truncation, max_length)

    def _memory_batch(
        self,
        receiver: list[Tokenized],
        contexts: list[str],
        single: bool,
        layout: BatchLayout,
        add_sharer_bos: bool | None,
        cut: tuple[bool, int | None],
    ) -> BatchFeature:
        """Give every prompt a slot for each token of its context, those of one sharer after those of another."""
        bos = self.add_sharer_bos if add_sharer_bos is None else add_sharer_bos
        layout.check_rows([ids for ids, _ in receiver])
        rows = [ids[: self.memory_sink_tokens] for ids, _ in receiver]
        sharers = []
        for index, sharer in enumerate(self.sharer_tokenizers):
            read = [self._tokenize_sharer(index, context, bos, *cut)[0] if context else [] for context in contexts]
            # The sharer's start is its own sink: the receiver has one.
            firsts = [int(bool(ids) and ids[0] == sharer.bos_token_id) for ids in read]
            starts = [len(row) for row in rows]
            rows = [row + [0] * (len(ids) - first) for row, ids, first in zip(rows, read, firsts, strict=True)]
            sharers.append((layout.pad(read, sharer), read, firsts, starts))
        tails = [ids[self.memory_sink_tokens :] for ids, _ in receiver]
        lengths = [len(row) for row in rows]
        input_ids, attention_mask = layout.pad(
            [row + tail for row, tail in zip(rows, tails, strict=True)], self.tokenizer
        )
        # What stands at a slot is never read; the padding token vanishes when the output is decoded.
        pad = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        outputs: list[tuple[torch.Tensor, ...]] = []
        for (sharer_ids, sharer_mask), read, firsts, starts in sharers:
            alignment = torch.full_like(input_ids, -1)
            for row, (ids, first, start) in enumerate(zip(read, firsts, starts, strict=True)):
                column = input_ids.shape[1] - lengths[row] - len(tails[row]) + start
                slots = slice(column, column + len(ids) - first)
                alignment[row, slots] = torch.arange(first, len(ids)) + sharer_ids.shape[1] - len(ids)
                input_ids[row, slots] = pad
            outputs.append((sharer_ids, sharer_mask, alignment))
        return self._finish(input_ids, attention_mask, outputs, single, layout)

    def _batch(
        self,
        receiver: list[Tokenized],
        sharer_rows: SharerRows,
        single: bool,
        layout: BatchLayout,
        add_sharer_bos: bool | None,
    ) -> BatchFeature:
        rows = [ids for ids, _ in receiver]
        layout.check_rows(rows)
        bos = self.add_sharer_bos if add_sharer_bos is None else add_sharer_bos
        input_ids, attention_mask = layout.pad(rows, self.tokenizer)
        outputs: list[tuple[torch.Tensor, ...]] = []
        for index, (sharer, alignment) in enumerate(zip(self.sharer_tokenizers, self.token_alignments, strict=True)):
            table = self.token_tables[index]
            if alignment == "identity":
                positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
                read = positions.masked_fill(attention_mask == 0, -1)
                sharer_ids, sharer_mask = input_ids.clone(), attention_mask.clone()
            elif table is not None:
                bos_token_id = own_bos_token_id(sharer) if bos else None
                mapped = apply_token_table(table, input_ids, attention_mask, bos_token_id)
                # The column of the BOS makes the batch one wider than the receiver's.
                sharer_ids, sharer_mask, read = layout.widen(*mapped)
            else:
                theirs = sharer_rows(index, bos)
                sharer_ids, sharer_mask = layout.pad([ids for (ids, _), _ in theirs], sharer)
                read = torch.full_like(input_ids, -1)
                for row, ((_, offsets), ((ids, spans), segments)) in enumerate(zip(receiver, theirs, strict=True)):
                    aligned = torch.from_numpy(align_spans(offsets, spans, segments))
                    shift = sharer_ids.shape[1] - len(ids)
                    read[row, -len(offsets) :] = torch.where(aligned < 0, -1, aligned + shift)
            outputs.append((sharer_ids, sharer_mask, mask_last_position(read, attention_mask)))
        return self._finish(input_ids, attention_mask, outputs, single, layout)

    def _finish(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        outputs: list[tuple[torch.Tensor, ...]],
        single: bool,
        layout: BatchLayout,
    ) -> BatchFeature:
        columns = [list(column) if len(outputs) > 1 else column[0] for column in zip(*outputs, strict=True)]
        values = [layout.finish(value, single) for value in (input_ids, attention_mask, *columns)]
        return BatchFeature(dict(zip(self.model_input_names, values, strict=True)))
