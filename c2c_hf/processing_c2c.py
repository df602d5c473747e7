"""`C2CProcessor`: texts or chats in; one batch with the token ids of all models and their alignment out."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE, PROCESSOR_NAME

from ._files import staged_folder
from .alignment.chat_template import Message, RenderedChat, chat_segments, plain_messages
from .alignment.padding import BatchLayout, pad_token_id
from .alignment.report import AlignmentReport, alignment_report
from .alignment.spans import Segment, align_slots, align_spans
from .alignment.special_tokens import BREAK, special_token_splitter, split_strings
from .alignment.token_table import apply_token_table, build_token_table, own_bos_token_id, resolve_alignments
from .checkpoints.base_models import TOKENIZER_KWARGS, load_tokenizer, recorded_kwargs
from .checkpoints.download import HUB_KWARGS, fetch_folder
from .checkpoints.remote_code import write_code
from .configuration_c2c import MEMORY_GRIDS, MODES, C2CConfig, check_choice, one_per_sharer
from .inference.fingerprints import tokenizer_hash
from .inference.pair_settings import PairSettings

#: Arguments of the constructor that are saved in `processor_config.json`.
_FIELDS = (
    "token_alignment",
    "add_sharer_bos",
    "mode",
    "memory_grid",
    "memory_sink_tokens",
    "unknown",
    "partial_characters",
)
#: Files of a saved processor, as patterns for the download.
_FILES = (
    *(PROCESSOR_NAME, "*token*", "vocab.*", "merges.txt", "*.model", "chat_template.*", "additional_chat_templates/*"),
    *("sharer_*/*", "*.py"),
)
#: Files that only some tokenizers write but every tokenizer loads: those of an earlier save are removed.
_OPTIONAL_FILES = ("added_tokens.json", "special_tokens_map.json", CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE)


class Tokens(NamedTuple):
    """One tokenized text.

    Attributes:
        ids: Token ids.
        offsets: Characters `(start, end)` of each token, empty for special tokens; `[]` where no sharer is aligned by
            `"span"`.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class Prompt(NamedTuple):
    """One row of a call, before tokenization.

    Attributes:
        text: Text of the receiver.
        context: Text that only the sharers see, `""` for none.
        sharer_text: Sharer index -> the text of that sharer, context included, and the runs of characters that it
            shares with the receiver's.
        context_start: Returns the character of `text` in front of which the context would go.
    """

    text: str
    context: str
    sharer_text: Callable[[int], tuple[str, list[Segment]]]
    context_start: Callable[[], int]


class SharerRow(NamedTuple):
    """One row for one sharer, before padding.

    Attributes:
        ids: Token ids, `(sharer_len,)`.
        mask: 1 at tokens that the sharer sees, `(sharer_len,)`.
        alignment: Sharer position of each receiver position or -1, `(receiver_len,)`, int64.
    """

    ids: Sequence[int]
    mask: Sequence[int]
    alignment: np.ndarray


class Row(NamedTuple):
    """One row of the batch, before padding.

    Attributes:
        ids: The receiver's token ids, in memory mode with the slots.
        sharers: One entry per sharer.
    """

    ids: list[int]
    sharers: list[SharerRow]


def _as_tokenizer(
    name: str | os.PathLike | PreTrainedTokenizerBase, model_kwargs: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer, or return a loaded one."""
    if isinstance(name, PreTrainedTokenizerBase):
        return name
    return load_tokenizer(name, model_kwargs)


def _prefix(context: str) -> str:
    """Separate a context from the text that follows it."""
    return f"{context}\n\n" if context else ""


def _text_for_sharer(text: str, context: str, sharer_index: int) -> tuple[str, list[Segment]]:
    """Return a plain text as every sharer gets it, see [`Prompt`]."""
    prefix = _prefix(context)
    return prefix + text, [(0, len(prefix), len(text))]


def _context_start(text: str, bos_token: str | None) -> int:
    """Return the character of a plain text in front of which a context goes: the first one behind the BOS."""
    return len(bos_token) if bos_token is not None and text.startswith(bos_token) else 0


def _table_row(table: torch.Tensor, receiver_ids: list[int], bos_token_id: int | None) -> SharerRow:
    """Map the receiver's tokens to a sharer's one by one."""
    # `torch.tensor` is many times slower on a long list.
    ids = torch.from_numpy(np.array([receiver_ids], dtype=np.int64))
    sharer_ids, mask, alignment = apply_token_table(table, ids, torch.ones_like(ids), bos_token_id)
    return SharerRow(sharer_ids[0].tolist(), mask[0].tolist(), alignment[0].numpy())


def _sharer_grid(context_ids: list[int], bos_token_id: int | None) -> range:
    """Return the sharer position that fills each memory slot: one slot per token of the context.

    The sharer's BOS gets no slot, since the receiver's own first tokens serve as attention sink.
    """
    starts_with_bos = bos_token_id is not None and context_ids[:1] == [bos_token_id]
    return range(int(starts_with_bos), len(context_ids))


def _is_saved(name: str) -> bool:
    """Return whether an entry of a folder belongs to a saved processor, though not every processor has it."""
    return name in _OPTIONAL_FILES or re.fullmatch("sharer_[0-9]+", name) is not None


class C2CProcessor(ProcessorMixin):
    """Tokenizers of the receiver and of its sharers behind one call.

    Args:
        tokenizer: The receiver's tokenizer.
        sharer_tokenizers: One tokenizer per sharer, or a single one.
        token_alignment: `"identity"`, `"first"`, `"longest"` or `"span"`, one for all sharers or one per sharer.
            `None`: `"identity"` where the vocabularies are the same, else `"span"`; in memory mode `"span"`.
        add_sharer_bos: Give each sharer the BOS that its own tokenizer adds. Off: none, as in the reference.
        mode: How `sharer_context` reaches the receiver, see [`C2CConfig`]: `"fusion"`, or `"memory"`, where the prompt
            gets one slot per context token.
        memory_grid: Whose tokens of the context have slots, see [`C2CConfig`].
        memory_sink_tokens: Number of the prompt's first tokens that are never slots.
        unknown: Of the token tables, see [`~alignment.token_table.build_token_table`].
        partial_characters: Of the token tables as well.
        chat_template: Replaces the receiver's chat template.

    Raises:
        TypeError: A tokenizer is something else.
        ValueError: For an unknown value, `"identity"` between different vocabularies, or `"span"` with a slow
            tokenizer, which has no character offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sharer_tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase],
        token_alignment: str | Sequence[str] | None = None,
        add_sharer_bos: bool = True,
        mode: str = "fusion",
        memory_grid: str = "receiver",
        memory_sink_tokens: int = 1,
        unknown: str = "skip",
        partial_characters: str = "skip",
        chat_template: str | None = None,
    ) -> None:
        if isinstance(sharer_tokenizers, PreTrainedTokenizerBase):
            sharer_tokenizers = [sharer_tokenizers]
        sharers: list[PreTrainedTokenizerBase] = list(sharer_tokenizers)
        for name, candidate in [("tokenizer", tokenizer), *(("sharer_tokenizers", sharer) for sharer in sharers)]:
            if not isinstance(candidate, PreTrainedTokenizerBase):
                raise TypeError(f"`{name}` must hold tokenizers, got {type(candidate).__name__}.")
        if not sharers:
            raise ValueError("`sharer_tokenizers` is empty: give at least one sharer's tokenizer.")
        check_choice("unknown", unknown, ("skip", "unk"))
        check_choice("partial_characters", partial_characters, ("skip", "replace"))
        check_choice("mode", mode, MODES)
        check_choice("memory_grid", memory_grid, MEMORY_GRIDS)
        if not isinstance(add_sharer_bos, bool):
            raise ValueError(f"`add_sharer_bos` must be True or False, got {add_sharer_bos!r}.")
        if type(memory_sink_tokens) is not int or memory_sink_tokens < 0:
            raise ValueError(f"`memory_sink_tokens` must be an integer of at least 0, got {memory_sink_tokens!r}.")
        if mode == "memory" and token_alignment is None:
            token_alignment = "span"
        self.token_alignments = resolve_alignments(token_alignment, [tokenizer, *sharers])
        if mode == "memory" and set(self.token_alignments) != {"span"}:
            raise ValueError(f"`mode='memory'` needs `token_alignment='span'`, got {self.token_alignments}.")
        for alignment, sharer in zip(self.token_alignments, sharers, strict=True):
            slow = [type(t).__name__ for t in (tokenizer, sharer) if not t.is_fast]
            if alignment == "span" and slow:
                raise ValueError(
                    f"`token_alignment='span'` follows character offsets, which the slow tokenizer {slow[0]} lacks: "
                    "use a fast tokenizer, or 'first' or 'longest'."
                )
        self.tokenizer = tokenizer
        self.sharer_tokenizers = sharers
        self.add_sharer_bos = add_sharer_bos
        self.mode = mode
        self.memory_grid = memory_grid
        self.memory_sink_tokens = memory_sink_tokens
        self.unknown = unknown
        self.partial_characters = partial_characters
        self._bos_token_ids = [own_bos_token_id(sharer) for sharer in sharers]
        self._split = special_token_splitter([tokenizer, *sharers])
        self._token_tables: list[torch.Tensor | None] | None = None
        self._tokenizer_hashes: list[str] | None = None
        if chat_template is not None and chat_template != tokenizer.chat_template:
            self.tokenizer = copy.deepcopy(tokenizer)
            self.chat_template = chat_template

    @classmethod
    def from_receiver_and_sharers(
        cls,
        receiver: str | os.PathLike | PreTrainedTokenizerBase,
        sharers: str | os.PathLike | PreTrainedTokenizerBase | Sequence[str | os.PathLike | PreTrainedTokenizerBase],
        token_alignment: str | Sequence[str] | None = None,
        receiver_kwargs: Mapping[str, Any] | None = None,
        sharer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        **processor_kwargs: Any,
    ) -> C2CProcessor:
        """Build from Hub ids, folders or tokenizers.

        Args:
            receiver: Id, folder or tokenizer of the receiver.
            sharers: The same, one or several.
            token_alignment: As in the constructor.
            receiver_kwargs: Arguments of the receiver's `from_pretrained`; those that concern weights are ignored.
            sharer_kwargs: The same for the sharers: one dictionary for all, or one per sharer.
            processor_kwargs: Further arguments of the constructor.

        Raises:
            ValueError: If there is not one `sharer_kwargs` per sharer, and as the constructor.
        """
        names = [sharers] if isinstance(sharers, str | os.PathLike | PreTrainedTokenizerBase) else list(sharers)
        all_kwargs = [receiver_kwargs, *one_per_sharer("sharer_kwargs", sharer_kwargs, len(names))]
        tokenizers = [
            _as_tokenizer(name, kwargs or {}) for name, kwargs in zip([receiver, *names], all_kwargs, strict=True)
        ]
        return cls(tokenizers[0], tokenizers[1:], token_alignment, **processor_kwargs)

    @classmethod
    def from_config(
        cls,
        config: C2CConfig,
        receiver: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        sharers: str
        | os.PathLike
        | PreTrainedTokenizerBase
        | Sequence[str | os.PathLike | PreTrainedTokenizerBase]
        | None = None,
    ) -> C2CProcessor:
        """Build the processor of a model with this configuration.

        Args:
            config: Records names, alignments, mode and the grid of the slots.
            receiver: Id, folder or tokenizer of the receiver. `None`: the recorded name.
            sharers: The same, one or several. `None`: the recorded names.

        Raises:
            ValueError: A name is neither recorded nor given, and as the constructor.
        """
        # A model from elsewhere has revisions and files of its own.
        receiver_kwargs, *sharer_kwargs = recorded_kwargs(config)
        if receiver is not None:
            receiver_kwargs = {}
        if sharers is not None:
            sharer_kwargs = [{}] * config.num_sharers
        receiver = config.receiver_name_or_path if receiver is None else receiver
        if sharers is None:
            sharers = [sharer.name_or_path for sharer in config.sharers if sharer.name_or_path is not None]
            if len(sharers) < config.num_sharers:
                raise ValueError("`sharers` must be given: the configuration records no name for one of them.")
        if receiver is None:
            raise ValueError("`receiver` must be given: the configuration records no name for it.")
        return cls.from_receiver_and_sharers(
            receiver,
            sharers,
            config.token_alignments,
            receiver_kwargs,
            sharer_kwargs,
            mode=config.mode,
            memory_grid=config.memory_grid,
            memory_sink_tokens=config.memory_sink_tokens,
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of the outputs, in order."""
        sharers = ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment", "sharer_settings")
        return ["input_ids", "attention_mask", *sharers]

    @property
    def settings(self) -> list[PairSettings]:
        """Per sharer, what a model must agree on with this processor."""
        if self._tokenizer_hashes is None:
            # The hash of a large vocabulary takes a second.
            self._tokenizer_hashes = [tokenizer_hash(t) for t in (self.tokenizer, *self.sharer_tokenizers)]
        receiver_hash, *sharer_hashes = self._tokenizer_hashes
        return [
            PairSettings(self.mode, self.memory_grid, self.memory_sink_tokens, alignment, receiver_hash, sharer_hash)
            for alignment, sharer_hash in zip(self.token_alignments, sharer_hashes, strict=True)
        ]

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The receiver's chat template."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, chat_template: str | dict[str, str] | None) -> None:
        self.tokenizer.chat_template = chat_template

    @property
    def token_tables(self) -> list[torch.Tensor | None]:
        """One table `(receiver vocabulary,)` per sharer aligned by `first` or `longest`, else `None`; built once."""
        if self._token_tables is None:
            self._token_tables = [
                build_token_table(self.tokenizer, sharer, alignment, self.unknown, self.partial_characters)
                if alignment in ("first", "longest")
                else None
                for sharer, alignment in zip(self.sharer_tokenizers, self.token_alignments, strict=True)
            ]
        return self._token_tables

    def alignment_report(self, texts: Sequence[str], sharer_index: int = 0) -> AlignmentReport:
        """Measure one sharer's alignment on plain texts, see [`~alignment.report.alignment_report`]."""
        sharer, alignment = self.sharer_tokenizers[sharer_index], self.token_alignments[sharer_index]
        return alignment_report(self.tokenizer, sharer, texts, alignment, self.token_tables[sharer_index])

    # ------------------------------------------------------------------ texts and chats

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
        split_special_tokens: bool = False,
    ) -> BatchFeature:
        """Tokenize plain texts for the receiver and its sharers.

        Args:
            text: One text or several.
            sharer_context: Text that only the sharers see, before the text: one for all, or one per text.
            return_tensors: `"pt"`, or `None` for lists.
            padding: As in a tokenizer, on the left. Default: to the longest, where tensors need it.
            truncation: Cut to `max_length` tokens, on the side of the receiver's `truncation_side`.
            max_length: Largest number of tokens, of each model by itself.
            add_special_tokens: Of the receiver. A text that begins with the BOS gets no second one.
            add_sharer_bos: Overrides the processor's `add_sharer_bos`.
            pad_to_multiple_of: Round the widths up, of the receiver's and of each sharer's batch.
            split_special_tokens: Take special tokens in `text` as text, as those in `sharer_context` always are. Off,
                so that a rendered chat can be tokenized.

        Returns:
            `input_ids` and `attention_mask`, `(batch_size, seq_len)`; `sharer_input_ids` and `sharer_attention_mask`,
            `(batch_size, sharer_seq_len)`; `sharer_alignment`, `(batch_size, seq_len)`, the sharer position with which
            each receiver position is aligned or -1. With several sharers the last four are lists. In memory mode the
            prompt contains the slots: the alignment names the sharer token that fills each, and is -1 elsewhere. On
            the receiver's grid `input_ids` has the context's tokens there, which the receiver does not compute.
            `sharer_settings`, `(batch_size, 6)`, lets the model refuse inputs of a processor that is not its own.

        Raises:
            ValueError: For an empty list or text, contexts that do not fit, or lengths no tensor can hold.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(t, str) for t in texts):
            raise ValueError(f"`text` must be a string or a list of strings, got {text!r:.80}.")
        layout = BatchLayout(padding, truncation, max_length, pad_to_multiple_of, return_tensors)
        contexts = self._check_contexts(sharer_context, len(texts), "text")
        texts = [self._split(t) for t in texts] if split_special_tokens else texts
        prompts = [
            Prompt(
                t, context, partial(_text_for_sharer, t, context), partial(_context_start, t, self.tokenizer.bos_token)
            )
            for t, context in zip(texts, contexts, strict=True)
        ]
        return self._make_batch(prompts, layout, add_special_tokens, add_sharer_bos, isinstance(text, str))

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
        split_special_tokens: bool = True,
        **template_kwargs: Any,
    ) -> BatchFeature | torch.Tensor | str | list[str] | list[int] | list[list[int]]:
        """Render chats with each model's own template, tokenize them and align the messages' contents.

        With `first`, `longest` and `identity` the sharer gets the tokens of the receiver's rendered chat instead. A
        sharer without a chat template gets the contents as plain text.

        Args:
            conversation: One list of messages or several; contents are text or lists of text parts.
            chat_template: Replaces the receiver's template.
            sharer_chat_template: Replaces the sharers' templates: one for all, or one (or `None`) per sharer.
            sharer_context: Text that only the sharers see, in front of the first user message: one, or one per chat.
            add_generation_prompt: End with the start of an answer. Default: yes, unless a message is continued.
            continue_final_message: Leave the last message open.
            tokenize: Return the receiver's rendered text if off.
            return_tensors: `"pt"`, or `None` for lists.
            return_dict: Return only the receiver's ids if off.
            padding: As for texts.
            truncation: As for texts.
            max_length: As for texts.
            add_sharer_bos: Overrides the processor's `add_sharer_bos`. A BOS that a template writes stays.
            pad_to_multiple_of: As for texts.
            split_special_tokens: Take special tokens of any of the models in messages, tools and documents as text, so
                that they end no turn and begin none. Off: they are let through.
            template_kwargs: Arguments of every template: `tools`, `documents`, `enable_thinking`, ...

        Returns:
            The same outputs as for texts.

        Raises:
            ValueError: For contents that are not text, templates that refuse the chat, and as for texts.
        """
        if not len(conversation):
            raise ValueError("`conversation` is empty: give at least one message.")
        single = isinstance(conversation[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [conversation] if single else conversation)
        chats = [plain_messages(messages) for messages in conversations]
        if split_special_tokens and tokenize:
            chats = split_strings(chats, self._split)
            template_kwargs.update(
                {
                    name: split_strings(template_kwargs[name], self._split)
                    for name in ("tools", "documents")
                    if name in template_kwargs
                }
            )
        layout = BatchLayout(padding, truncation, max_length, pad_to_multiple_of, return_tensors)
        contexts = self._check_contexts(sharer_context, len(chats), "conversation")
        num_sharers = len(self.sharer_tokenizers)
        templates: list[str | None] = one_per_sharer("sharer_chat_template", sharer_chat_template, num_sharers)
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        template_kwargs.update(
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
        )
        rendered = [RenderedChat(self.tokenizer, chat, chat_template, template_kwargs) for chat in chats]
        if not tokenize:
            return rendered[0].text if single else [chat.text for chat in rendered]

        def sharer_text(
            messages: list[dict[str, Any]], context: str, receiver_chat: RenderedChat, sharer_index: int
        ) -> tuple[str, list[Segment]]:
            tokenizer, template = self.sharer_tokenizers[sharer_index], templates[sharer_index]
            chat = RenderedChat(tokenizer, messages, template, template_kwargs, sharer_index, _prefix(context))
            return chat.text, chat_segments(receiver_chat.spans, chat.spans)

        prompts = [
            Prompt(chat.text, context, partial(sharer_text, messages, context, chat), chat.context_start)
            for messages, context, chat in zip(chats, contexts, rendered, strict=True)
        ]
        batch = self._make_batch(prompts, layout, False, add_sharer_bos, single)
        return batch if return_dict else batch["input_ids"]

    def pad(
        self,
        encoded_inputs: Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Join outputs for single prompts into one batch.

        Args:
            encoded_inputs: Outputs with `return_tensors=None`, of one prompt each.
            padding: As for texts.
            max_length: The width under `padding="max_length"`.
            pad_to_multiple_of: As for texts.
            return_tensors: As for texts.

        Returns:
            The same outputs as for several texts.

        Raises:
            ValueError: There is no prompt, or lengths no tensor can hold.
        """
        names = self.model_input_names[2:5]
        several = len(self.sharer_tokenizers) > 1
        rows = []
        for encoded in encoded_inputs:
            columns = [encoded[name] if several else [encoded[name]] for name in names]
            sharers = [SharerRow(ids, mask, np.array(aligned)) for ids, mask, aligned in zip(*columns, strict=True)]
            rows.append(Row(encoded["input_ids"], sharers))
        layout = BatchLayout(padding, False, max_length, pad_to_multiple_of, return_tensors)
        layout.check_rows([row.ids for row in rows])
        return self._pad_rows(rows, layout, single=False)

    def _check_contexts(self, sharer_context: str | Sequence[str] | None, count: int, name: str) -> list[str]:
        """Return one context per row of the argument `name`, `""` for none."""
        if sharer_context is None:
            return [""] * count
        if set(self.token_alignments) != {"span"}:
            raise ValueError(
                f"`sharer_context` needs `token_alignment='span'`, got {self.token_alignments}: with the others a "
                "sharer gets the receiver's tokens and nothing else."
            )
        contexts = [sharer_context] * count if isinstance(sharer_context, str) else list(sharer_context)
        if len(contexts) != count:
            raise ValueError(
                f"`sharer_context` has {len(contexts)} entries for {count} in `{name}`: give one per entry."
            )
        return [self._split(context) for context in contexts]

    # ------------------------------------------------------------------ from prompts to a batch

    def _make_batch(
        self,
        prompts: list[Prompt],
        layout: BatchLayout,
        add_special_tokens: bool,
        add_sharer_bos: bool | None,
        single: bool,
    ) -> BatchFeature:
        """Tokenize every prompt for all models, align it row by row, and pad the rows."""
        receiver = [self._tokenize(self.tokenizer, prompt.text, add_special_tokens, layout) for prompt in prompts]
        layout.check_rows([tokens.ids for tokens in receiver])
        add_bos = self.add_sharer_bos if add_sharer_bos is None else add_sharer_bos
        make_row = self._fusion_row
        if self.mode == "memory":
            make_row = self._receiver_grid_row if self.memory_grid == "receiver" else self._sharer_grid_row
        rows = [make_row(prompt, tokens, add_bos, layout) for prompt, tokens in zip(prompts, receiver, strict=True)]
        return self._pad_rows(rows, layout, single)

    def _tokenize(
        self, tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool, layout: BatchLayout
    ) -> Tokens:
        """Tokenize one text, with one BOS at most, and its parts between [`BREAK`]s one by one.

        Truncation is done here: fast tokenizers keep their settings for it in an object that threads share.
        """
        if tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token):
            add_special_tokens = False
        with_offsets = "span" in self.token_alignments
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        is_special: list[int] = []
        start, num_last = 0, 0
        for index, part in enumerate(text.split(BREAK)):
            encoded = tokenizer(
                part,
                add_special_tokens=add_special_tokens and index == 0,
                return_offsets_mapping=with_offsets,
                return_attention_mask=False,
                return_special_tokens_mask=True,
                verbose=not layout.truncation,
            )
            # Special tokens that a tokenizer adds at the end stay there.
            end = len(ids) - num_last
            ids[end:end], is_special[end:end] = encoded["input_ids"], encoded["special_tokens_mask"]
            if with_offsets:
                own = encoded["offset_mapping"]
                offsets[end:end] = [(first + start, last + start) for first, last in own] if start else own
            if index == 0:
                num_last = len(list(takewhile(bool, reversed(is_special)))) if not all(is_special) else 0
            start += len(part) + 1
        if layout.truncation:
            side = self.tokenizer.truncation_side
            kept = layout.kept_positions(is_special, tokenizer.model_max_length, side)
            ids, offsets = [ids[i] for i in kept], [offsets[i] for i in kept] if with_offsets else []
        return Tokens(ids, offsets)

    def _fusion_row(self, prompt: Prompt, receiver: Tokens, add_bos: bool, layout: BatchLayout) -> Row:
        """Align a prompt's tokens with those of every sharer; the last prompt token is never fused."""
        sharers = []
        for index, (tokenizer, table) in enumerate(zip(self.sharer_tokenizers, self.token_tables, strict=True)):
            if self.token_alignments[index] == "span":
                text, segments = prompt.sharer_text(index)
                ids, offsets = self._tokenize(tokenizer, text, add_bos, layout)
                row = SharerRow(ids, [1] * len(ids), align_spans(receiver.offsets, offsets, segments))
            elif table is not None:
                row = _table_row(table, receiver.ids, self._bos_token_ids[index] if add_bos else None)
            else:
                row = SharerRow(receiver.ids, [1] * len(receiver.ids), np.arange(len(receiver.ids)))
            row.alignment[-1] = -1
            sharers.append(row)
        return Row(receiver.ids, sharers)

    def _receiver_grid_row(self, prompt: Prompt, receiver: Tokens, add_bos: bool, layout: BatchLayout) -> Row:
        """Put the receiver's tokens of the context, as slots, where its prompt would have them, once per sharer.

        They are the same in front of every prompt, since they are tokenized by themselves.
        """
        if not prompt.context:
            return Row(
                receiver.ids, [SharerRow([], [], np.full(len(receiver.ids), -1)) for _ in self.sharer_tokenizers]
            )
        text, start = _prefix(prompt.context), prompt.context_start()
        num_before = next((i for i, (_, end) in enumerate(receiver.offsets) if end > start), len(receiver.ids))
        # Without a BOS nothing is in front of a plain text; its last token is always behind the slots.
        num_before = max(num_before, min(self.memory_sink_tokens, len(receiver.ids) - 1))
        own = self._tokenize(self.tokenizer, text, False, layout)
        ids, parts = receiver.ids[:num_before], []
        for tokenizer in self.sharer_tokenizers:
            tokens = self._tokenize(tokenizer, text, add_bos, layout)
            aligned = align_slots(own.offsets, tokens.offsets)
            # Those of which the sharer, by truncation, has nothing are left out.
            kept = np.flatnonzero(aligned >= 0)
            parts.append((tokens.ids, aligned[kept], len(ids)))
            ids = ids + [own.ids[i] for i in kept]
        ids = ids + receiver.ids[num_before:]
        sharers = []
        for sharer_ids, aligned, first in parts:
            alignment = np.full(len(ids), -1, dtype=np.int64)
            alignment[first : first + len(aligned)] = aligned
            sharers.append(SharerRow(sharer_ids, [1] * len(sharer_ids), alignment))
        return Row(ids, sharers)

    def _sharer_grid_row(self, prompt: Prompt, receiver: Tokens, add_bos: bool, layout: BatchLayout) -> Row:
        """Put slots for the context between the prompt's first tokens and the others, one sharer's after another's."""
        contexts = [
            self._tokenize(tokenizer, prompt.context, add_bos, layout) if prompt.context else Tokens([], [])
            for tokenizer in self.sharer_tokenizers
        ]
        fillers = [
            _sharer_grid(tokens.ids, tokenizer.bos_token_id)
            for tokens, tokenizer in zip(contexts, self.sharer_tokenizers, strict=True)
        ]
        # The last token of a prompt comes after the slots, since it is the one that predicts the answer.
        num_sink = min(self.memory_sink_tokens, len(receiver.ids) - 1)
        sink, rest = receiver.ids[:num_sink], receiver.ids[num_sink:]
        # The ids of slots are not used; the padding token is skipped when outputs are decoded.
        slots = [pad_token_id(self.tokenizer)] * sum(map(len, fillers))
        ids = [*sink, *slots, *rest]
        sharers, start = [], len(sink)
        for tokens, filler in zip(contexts, fillers, strict=True):
            alignment = np.full(len(ids), -1)
            alignment[start : start + len(filler)] = filler
            start += len(filler)
            sharers.append(SharerRow(tokens.ids, [1] * len(tokens.ids), alignment))
        return Row(ids, sharers)

    def _pad_rows(self, rows: list[Row], layout: BatchLayout, single: bool) -> BatchFeature:
        """Pad every model's rows on the left; aligned positions are shifted by the sharer's padding."""
        receiver_ids = [row.ids for row in rows]
        columns = [
            layout.pad(receiver_ids, pad_token_id(self.tokenizer)),
            layout.pad([[1] * len(ids) for ids in receiver_ids], 0),
        ]
        outputs = [layout.output(column, single) for column in columns]
        per_sharer = []
        for index, (tokenizer, settings) in enumerate(zip(self.sharer_tokenizers, self.settings, strict=True)):
            sharer_rows = [row.sharers[index] for row in rows]
            sharer_ids = layout.pad([row.ids for row in sharer_rows], pad_token_id(tokenizer))
            width = sharer_ids.shape[1]
            shifted = [np.where(row.alignment < 0, -1, row.alignment + width - len(row.ids)) for row in sharer_rows]
            mask, alignment = layout.pad([row.mask for row in sharer_rows], 0), layout.pad(shifted, -1)
            tensors = (sharer_ids, mask, alignment, settings.to_tensor(len(rows)))
            per_sharer.append([layout.output(tensor, single) for tensor in tensors])
        outputs += per_sharer[0] if len(per_sharer) == 1 else map(list, zip(*per_sharer, strict=True))
        return BatchFeature(dict(zip(self.model_input_names, outputs, strict=True)))

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return what `ProcessorMixin` saves by itself: the receiver's tokenizer. The number of sharers varies."""
        return ["tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `processor_config.json`."""
        return {
            "processor_class": type(self).__name__,
            "num_sharers": len(self.sharer_tokenizers),
            "token_alignment": list(self.token_alignments),
            "add_sharer_bos": self.add_sharer_bos,
            "mode": self.mode,
            "memory_grid": self.memory_grid,
            "memory_sink_tokens": self.memory_sink_tokens,
            "unknown": self.unknown,
            "partial_characters": self.partial_characters,
            "tokenizer_hashes": [tokenizer_hash(t) for t in (self.tokenizer, *self.sharer_tokenizers)],
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        with_code: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Save the receiver's tokenizer into a folder, each sharer's into `sharer_0`, ..., and the configuration.

        An interrupted save leaves what was in the folder before. Other files in the folder, a fuser's say, stay.

        Args:
            save_directory: The folder; made if needed.
            push_to_hub: Upload the processor afterwards. [`C2CForCausalLM.push_to_hub`] uploads it with its fuser.
            with_code: Save a short code file beside it, so that `AutoProcessor.from_pretrained(...,
                trust_remote_code=True)` finds the class of the installed package without `import c2c_hf`.
            kwargs: `repo_id` (default: the folder's name) and arguments of [`push_to_hub`].

        Returns:
            The path of `processor_config.json`.

        Raises:
            ValueError: `save_directory` is a file.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`save_directory` must be a folder, but {str(target)!r} is a file.")
        with staged_folder(target, replaces=_is_saved, last=PROCESSOR_NAME) as staging:
            super().save_pretrained(staging)
            write_code(staging, PROCESSOR_NAME, with_code)
            for index, sharer in enumerate(self.sharer_tokenizers):
                sharer.save_pretrained(staging / f"sharer_{index}")
        if push_to_hub:
            # The mixin's own upload in `save_pretrained` would name the repository after the staging folder.
            self.push_to_hub(kwargs.pop("repo_id", target.resolve().name), **kwargs)
        return [str(target / PROCESSOR_NAME)]

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoProcessor") -> None:
        """Do nothing: this class is installed, so that its code is not copied into saved folders.

        transformers calls this on every class that it loads by `trust_remote_code=True`.
        """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> C2CProcessor:
        """Load a saved processor from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            kwargs: Arguments of the Hub (`revision`, `token`, ...), `trust_remote_code`, or arguments of the
                constructor that replace the saved ones.

        Raises:
            ValueError: If there is no complete processor, a vocabulary is not the saved one, or `subfolder` goes
                outside the repository.
            TypeError: For an unknown argument.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        folder = fetch_folder(name, _FILES, hub)
        if (folder / PROCESSOR_NAME).is_file():
            content = json.loads((folder / PROCESSOR_NAME).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"`{name}`: {PROCESSOR_NAME} must hold an object, got {content!r:.80}.")
        config, _ = cls.get_processor_dict(folder)
        tokenizer_kwargs = {key: kwargs.pop(key) for key in TOKENIZER_KWARGS if key in kwargs}
        if unexpected := [key for key in kwargs if key not in _FIELDS and not key.startswith("_")]:
            raise TypeError(f"`from_pretrained` got unknown arguments: {', '.join(map(repr, unexpected))}.")
        if not isinstance(config.get("num_sharers"), int):
            raise ValueError(
                f"`{name}` holds no complete C2CProcessor (processor_config.json with `num_sharers`): build one with "
                "`C2CProcessor.from_receiver_and_sharers`."
            )
        folders = [folder]
        # Checked one by one, since a damaged configuration may name any number.
        for index in range(config["num_sharers"]):
            folders.append(folder / f"sharer_{index}")
            if not folders[-1].is_dir():
                raise ValueError(f"`{name}` lacks the sharer's tokenizer folder `{folders[-1].name}`.")
        tokenizers = [load_tokenizer(place, tokenizer_kwargs) for place in folders]
        hashes = [tokenizer_hash(tokenizer) for tokenizer in tokenizers]
        saved_hashes = config.get("tokenizer_hashes") or [None] * len(folders)
        if not isinstance(saved_hashes, list):
            raise ValueError(f"`{name}`: `tokenizer_hashes` must be a list, got {saved_hashes!r:.80}.")
        for place, found, saved in zip(folders, hashes, saved_hashes, strict=False):
            if saved is not None and found != saved:
                raise ValueError(
                    f"`{name}`: the vocabulary in {place.name!r} is not the saved one, whose hash is {saved}; "
                    "download or save the processor anew."
                )
        fields = {key: kwargs.get(key, config.get(key)) for key in _FIELDS if key in kwargs or key in config}
        processor = cls(tokenizers[0], tokenizers[1:], **fields)
        processor._tokenizer_hashes = hashes
        return processor
