"""`C2CProcessor`: texts or chats -> the receiver's batch, the sharers' batches and who reads whom."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .alignment import (
    AlignmentReport,
    ContentSpan,
    Segment,
    align_spans,
    alignment_report,
    apply_token_table,
    build_token_table,
    chat_segments,
    locate_contents,
    mask_last_position,
    own_bos_token_id,
    same_vocabulary,
)

TOKEN_ALIGNMENTS = ("identity", "first", "longest", "span")
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
#: What a base model's arguments may say about its tokenizer; the others concern its weights alone.
TOKENIZER_KWARGS = (*HUB_KWARGS, "code_revision", "gguf_file", "tokenizer_type", "trust_remote_code", "use_fast")

Message = Mapping[str, Any]
#: Ids and character offsets; no offsets where nothing is aligned by `span`.
Tokenized = tuple[list[int], list[tuple[int, int]]]
#: (sharer index, add BOS) -> every row's tokens and segments. Called for `span` alone.
SharerRows = Callable[[int, bool], list[tuple[Tokenized, list[Segment]]]]


class C2CProcessor(ProcessorMixin):
    """Tokenizers of the receiver and of its sharers behind one call.

    Args:
        tokenizer: The receiver's tokenizer.
        sharer_tokenizers: One tokenizer per sharer, or a single one.
        token_alignment: `"identity"`, `"first"`, `"longest"` or `"span"`, one for all or one per sharer. Default:
            `"identity"` where the vocabularies are the same, else `"span"`.
        add_sharer_bos: Give sharers the BOS their own tokenizer writes. Off, they read as in the reference.
        unknown: Of the token tables, see [`~alignment.build_token_table`].
        partial_characters: Of the token tables as well.
        chat_template: Replaces the receiver's chat template.

    Raises:
        ValueError: For an unknown alignment, `identity` between different vocabularies, or `span` with a slow
            tokenizer, which knows no character offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sharer_tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase],
        token_alignment: str | Sequence[str] | None = None,
        add_sharer_bos: bool = True,
        unknown: str = "skip",
        partial_characters: str = "skip",
        chat_template: str | None = None,
    ) -> None:
        sharers = [sharer_tokenizers] if isinstance(sharer_tokenizers, PreTrainedTokenizerBase) else sharer_tokenizers
        self.tokenizer = tokenizer
        self.sharer_tokenizers = list(sharers)
        self.token_alignment = token_alignment
        self.add_sharer_bos = add_sharer_bos
        self.unknown = unknown
        self.partial_characters = partial_characters
        self._token_tables: list[torch.Tensor | None] | None = None
        for name, candidate in [("tokenizer", tokenizer), *(("sharer_tokenizers", s) for s in self.sharer_tokenizers)]:
            if not isinstance(candidate, PreTrainedTokenizerBase):
                raise TypeError(f"`{name}` must hold tokenizers, got {type(candidate).__name__}.")
        if not self.sharer_tokenizers:
            raise ValueError("`sharer_tokenizers` is empty: give at least one sharer's tokenizer.")
        for name, value, allowed in (
            ("unknown", unknown, ("skip", "unk")),
            ("partial_characters", partial_characters, ("skip", "replace")),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        self.token_alignments = self._resolve_alignments(token_alignment)
        if chat_template is not None and chat_template != tokenizer.chat_template:
            self.tokenizer = copy.deepcopy(tokenizer)
            self.chat_template = chat_template

    def _resolve_alignments(self, token_alignment: str | Sequence[str] | None) -> list[str]:
        count = len(self.sharer_tokenizers)
        wanted = [token_alignment] * count if isinstance(token_alignment, str | None) else list(token_alignment)
        if len(wanted) != count:
            raise ValueError(
                f"`token_alignment` names {len(wanted)} alignments for {count} sharers: give one per sharer."
            )
        resolved = []
        for index, (alignment, sharer) in enumerate(zip(wanted, self.sharer_tokenizers, strict=True)):
            if alignment is not None and alignment not in TOKEN_ALIGNMENTS:
                allowed = ", ".join(map(repr, TOKEN_ALIGNMENTS))
                raise ValueError(f"`token_alignment` must be one of {allowed}, got {alignment!r}.")
            same = alignment in (None, "identity") and same_vocabulary(self.tokenizer, sharer)
            if alignment == "identity" and not same:
                raise ValueError(
                    f"`token_alignment='identity'` needs one vocabulary, but the receiver's has {len(self.tokenizer)} "
                    f"tokens and that of sharer {index} {len(sharer)}, or other ids: use 'span', 'first' or 'longest'."
                )
            alignment = alignment or ("identity" if same else "span")
            if alignment == "span" and not (self.tokenizer.is_fast and sharer.is_fast):
                slow = self.tokenizer if not self.tokenizer.is_fast else sharer
                raise ValueError(
                    "`token_alignment='span'` follows character offsets, which the slow tokenizer "
                    f"{type(slow).__name__} lacks: use a fast tokenizer, or 'first' or 'longest'."
                )
            resolved.append(alignment)
        return resolved

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
            receiver_kwargs: Arguments of the receiver's `from_pretrained`; those about weights are left aside.
            sharer_kwargs: The same for the sharers: one dictionary for all, or one per sharer.
            processor_kwargs: Further arguments of the constructor.

        Raises:
            ValueError: If there is not one `sharer_kwargs` per sharer, and as the constructor.
        """
        names = [sharers] if isinstance(sharers, str | os.PathLike | PreTrainedTokenizerBase) else list(sharers)
        per_sharer = [sharer_kwargs] * len(names) if isinstance(sharer_kwargs, Mapping | None) else list(sharer_kwargs)
        if len(per_sharer) != len(names):
            raise ValueError(f"`sharer_kwargs` has {len(per_sharer)} entries for {len(names)} sharers.")
        tokenizers = [_load(name, kwargs) for name, kwargs in zip(names, per_sharer, strict=True)]
        return cls(_load(receiver, receiver_kwargs), tokenizers, token_alignment, **processor_kwargs)

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Name what `ProcessorMixin` saves by itself: the receiver's tokenizer. The sharers' number is not fixed."""
        return ["tokenizer"]

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The receiver's chat template."""
        return self.tokenizer.chat_template

    @chat_template.setter
    def chat_template(self, chat_template: str | dict[str, str] | None) -> None:
        self.tokenizer.chat_template = chat_template

    def to_dict(self) -> dict[str, Any]:
        """Return what `processor_config.json` holds."""
        return {
            "processor_class": type(self).__name__,
            "num_sharers": len(self.sharer_tokenizers),
            "token_alignment": list(self.token_alignments),
            "add_sharer_bos": self.add_sharer_bos,
            "unknown": self.unknown,
            "partial_characters": self.partial_characters,
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Save the receiver's tokenizer into a folder, each sharer's into `sharer_0`, ..., the configuration last."""
        for index, sharer in enumerate(self.sharer_tokenizers):
            sharer.save_pretrained(os.path.join(save_directory, f"sharer_{index}"))
        if push_to_hub:
            files = super().save_pretrained(save_directory)
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            # `push_to_hub` uploads subfolders whole; the mixin's own upload skips those written before it starts.
            self.push_to_hub(repo_id, **kwargs)
            return files
        return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        **kwargs: Any,
    ) -> C2CProcessor:
        """Load a saved processor from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            kwargs: Arguments of the Hub (`revision`, `token`, ...), `trust_remote_code`, or fields to override.

        Raises:
            ValueError: If there is no complete processor.
            TypeError: For an unknown argument.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        config, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub)
        tokenizer_kwargs = {**hub, **{key: kwargs.pop(key) for key in TOKENIZER_KWARGS if key in kwargs}}
        fields = ("token_alignment", "add_sharer_bos", "unknown", "partial_characters")
        if unexpected := [key for key in kwargs if key not in fields and not key.startswith("_")]:
            raise TypeError(f"`from_pretrained` got unknown arguments: {', '.join(map(repr, unexpected))}.")
        if not isinstance(config.get("num_sharers"), int):
            raise ValueError(
                f"`{pretrained_model_name_or_path}` holds no complete C2CProcessor (processor_config.json with "
                "`num_sharers`): build one with `C2CProcessor.from_receiver_and_sharers`."
            )
        subfolder = tokenizer_kwargs.pop("subfolder", None) or ""
        folders = [os.path.join(subfolder, f"sharer_{index}") for index in range(config["num_sharers"])]
        for folder in folders:
            if os.path.isdir(pretrained_model_name_or_path) and not os.path.isdir(
                os.path.join(pretrained_model_name_or_path, folder)
            ):
                raise ValueError(f"`{pretrained_model_name_or_path}` lacks the sharer's tokenizer folder `{folder}`.")
        receiver, *sharers = (
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=folder, **tokenizer_kwargs)
            for folder in (subfolder, *folders)
        )
        values: dict[str, Any] = {
            key: kwargs.get(key, config.get(key)) for key in fields if key in kwargs or key in config
        }
        return cls(receiver, sharers, **values)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the outputs, in order."""
        return ["input_ids", "attention_mask", "sharer_input_ids", "sharer_attention_mask", "sharer_alignment"]

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
        """Measure one sharer's alignment on plain texts, see [`~alignment.alignment_report`]."""
        sharer, alignment = self.sharer_tokenizers[sharer_index], self.token_alignments[sharer_index]
        return alignment_report(self.tokenizer, sharer, texts, alignment, self.token_tables[sharer_index])

    # ------------------------------------------------------------------ texts

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

        Returns:
            `input_ids` and `attention_mask`, `(batch_size, seq_len)`; `sharer_input_ids` and `sharer_attention_mask`,
            `(batch_size, sharer_seq_len)`; `sharer_alignment`, `(batch_size, seq_len)`, the sharer position each
            receiver position reads or -1. With several sharers the last three are lists.

        Raises:
            ValueError: For an empty list or text, contexts that do not fit, or lengths no tensor can hold.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(t, str) for t in texts):
            raise ValueError(f"`text` must be a string or a list of strings, got {text!r:.80}.")
        contexts = self._check_contexts(sharer_context, len(texts), "text")
        cut = (truncation, max_length)
        receiver = [self._tokenize(self.tokenizer, t, add_special_tokens, *cut) for t in texts]

        def sharer_rows(index: int, bos: bool) -> list[tuple[Tokenized, list[Segment]]]:
            rows = []
            for t, context in zip(texts, contexts, strict=True):
                head = f"{context}\n\n" if context else ""
                tokenized = self._tokenize_sharer(index, head + t, bos, *cut)
                rows.append((tokenized, [(0, len(head), len(t))]))
            return rows

        return self._batch(
            receiver, sharer_rows, isinstance(text, str), return_tensors, padding, max_length, add_sharer_bos
        )

    def _check_contexts(
        self, sharer_context: str | Sequence[str] | None, count: int, name: str
    ) -> Sequence[str | None]:
        if sharer_context is None:
            return [None] * count
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
        return contexts

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

    def _batch(
        self,
        receiver: list[Tokenized],
        sharer_rows: SharerRows,
        single: bool,
        return_tensors: str | None,
        padding: bool | str | None,
        max_length: int | None,
        add_sharer_bos: bool | None,
    ) -> BatchFeature:
        if return_tensors not in ("pt", None):
            raise ValueError(f"`return_tensors` must be 'pt' or None, got {return_tensors!r}.")
        if padding not in (None, True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"`padding` must be a bool, 'longest', 'max_length' or 'do_not_pad', got {padding!r}.")
        if not receiver:
            raise ValueError("There is nothing to process: give at least one text or conversation.")
        if padding == "max_length" and max_length is None:
            raise ValueError("`padding='max_length'` needs `max_length`.")
        for index, (ids, _) in enumerate(receiver):
            if not ids:
                raise ValueError(f"Text {index} gives the receiver no token: give a text that is not empty.")
        lengths = {len(ids) for ids, _ in receiver}
        if padding in (False, "do_not_pad") and len(lengths) > 1:
            raise ValueError(f"`padding={padding!r}` with rows of {sorted(lengths)} tokens: pass `padding=True`.")
        bos = self.add_sharer_bos if add_sharer_bos is None else add_sharer_bos
        width = max_length if padding == "max_length" else None
        input_ids, attention_mask = _pad_left([ids for ids, _ in receiver], self.tokenizer, width)
        outputs = []
        for index, (sharer, alignment) in enumerate(zip(self.sharer_tokenizers, self.token_alignments, strict=True)):
            table = self.token_tables[index]
            if alignment == "identity":
                positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
                output = (input_ids.clone(), attention_mask.clone(), torch.where(attention_mask.bool(), positions, -1))
            elif table is not None:
                bos_token_id = own_bos_token_id(sharer) if bos else None
                output = apply_token_table(table, input_ids, attention_mask, bos_token_id)
            else:
                rows = sharer_rows(index, bos)
                sharer_ids, sharer_mask = _pad_left([ids for (ids, _), _ in rows], sharer, width)
                aligned = torch.full_like(input_ids, -1)
                for row, ((_, offsets), ((ids, spans), segments)) in enumerate(zip(receiver, rows, strict=True)):
                    read = torch.from_numpy(align_spans(offsets, spans, segments))
                    aligned[row, -len(offsets) :] = torch.where(read < 0, -1, read + sharer_ids.shape[1] - len(ids))
                output = (sharer_ids, sharer_mask, aligned)
            outputs.append((*output[:2], mask_last_position(output[2], attention_mask)))
        columns = [[output[column] for output in outputs] for column in range(3)]
        values = [input_ids, attention_mask, *(column if len(outputs) > 1 else column[0] for column in columns)]
        if return_tensors is None:
            values = [_to_lists(value, single) for value in values]
        return BatchFeature(dict(zip(self.model_input_names, values, strict=True)))

    # ------------------------------------------------------------------ chats

    def apply_chat_template(  # type: ignore[override]
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
            template_kwargs: Handed to every template: `tools`, `documents`, `enable_thinking`, ...

        Returns:
            The same outputs as for texts.

        Raises:
            ValueError: For contents that are not text, templates that refuse the chat, and as for texts.
        """
        if not len(conversation):
            raise ValueError("`conversation` is empty: give at least one message.")
        single = isinstance(conversation[0], Mapping)
        chats = [_plain_messages(chat) for chat in ([conversation] if single else conversation)]  # type: ignore[arg-type]
        contexts = self._check_contexts(sharer_context, len(chats), "conversation")
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
        ours = [_Chat(self.tokenizer, chat, chat_template, template_kwargs, "the receiver") for chat in chats]
        if not tokenize:
            return ours[0].text if single else [chat.text for chat in ours]
        cut = (truncation, max_length)
        receiver = [self._tokenize(self.tokenizer, chat.text, False, *cut) for chat in ours]

        def sharer_rows(index: int, bos: bool) -> list[tuple[Tokenized, list[Segment]]]:
            rows = []
            sharer = self.sharer_tokenizers[index]
            for chat, own, context in zip(chats, ours, contexts, strict=True):
                theirs = _Chat(sharer, chat, templates[index], template_kwargs, f"sharer {index}", context)
                tokenized = self._tokenize_sharer(index, theirs.text, bos, *cut)
                rows.append((tokenized, chat_segments(own.spans(), theirs.spans())))
            return rows

        batch = self._batch(receiver, sharer_rows, single, return_tensors, padding, max_length, add_sharer_bos)
        return batch if return_dict else batch["input_ids"]


class _Chat:
    """One conversation rendered for one model, and where its messages' contents stand in it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[dict[str, Any]],
        chat_template: str | None,
        template_kwargs: dict[str, Any],
        who: str,
        context: str | None = None,
    ) -> None:
        self.tokenizer, self.messages, self.chat_template = tokenizer, messages, chat_template
        self.template_kwargs, self.who = template_kwargs, who
        self.plain = who != "the receiver" and chat_template is None and not tokenizer.chat_template
        # Only contents that say something have a place to find; a tool call's may be None.
        self.slots = [i for i, message in enumerate(messages) if message.get("content")]
        self.contents = [messages[i]["content"] for i in self.slots]
        self.heads = [0] * len(self.slots)
        head = f"{context}\n\n" if context else ""
        if self.plain:
            self.text = head + "\n".join(self.contents)
            self.start = len(head)
            return
        if head:
            if not self.slots:
                raise ValueError("`sharer_context` needs a message with content to stand in front of.")
            first = next((k for k, i in enumerate(self.slots) if messages[i].get("role") == "user"), 0)
            self.contents[first], self.heads[first] = head + self.contents[first], len(head)
        self.text = self.render(self.contents)

    def render(self, contents: list[str]) -> str:
        messages = [dict(message) for message in self.messages]
        for i, content in zip(self.slots, contents, strict=True):
            messages[i]["content"] = content
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, chat_template=self.chat_template, **self.template_kwargs
                )
            )
        except TemplateError as error:
            argument = "chat_template" if self.who == "the receiver" else "sharer_chat_template"
            raise ValueError(
                f"The chat template of {self.who} refuses this conversation ({error}): change it or pass `{argument}`."
            ) from error

    def spans(self) -> list[ContentSpan | None]:
        """Spans of the contents, counted without the context."""
        spans: list[ContentSpan | None] = []
        if self.plain:
            start = self.start
            for content in self.contents:
                spans.append((start, 0, len(content)))
                start += len(content) + 1
            return spans
        for span, head in zip(locate_contents(self.contents, self.text, self.render), self.heads, strict=True):
            cut = max(head - span[1], 0) if span else 0
            spans.append(span and (span[0] + cut, span[1] + cut - head, span[2] - head))
        return spans


def _plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copy messages, with text parts joined."""
    plain = []
    for message in messages:
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
                raise ValueError("`content` of a message must be text or a list of parts of type 'text'.")
            content = "".join(part["text"] for part in content)
        plain.append({**message, "content": content} if "content" in message else dict(message))
    return plain


def _load(
    name: str | os.PathLike | PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None
) -> PreTrainedTokenizerBase:
    if isinstance(name, PreTrainedTokenizerBase):
        return name
    return AutoTokenizer.from_pretrained(name, **{k: v for k, v in (kwargs or {}).items() if k in TOKENIZER_KWARGS})


def _pad_left(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, width: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows into `(batch_size, seq_len)` ids and mask. The mask decides; any id serves where pad is missing."""
    length = max(1, width or 0, *map(len, rows))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids, mask


def _to_lists(value: torch.Tensor | list[torch.Tensor], single: bool) -> list[Any]:
    if isinstance(value, list):
        return [_to_lists(item, single) for item in value]
    return value[0].tolist() if single else value.tolist()
