"""Chats as each model's own template renders them, and where the messages' contents stand in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .token_table import Segment

Message = Mapping[str, Any]
#: (start in the rendered text, first and last + 1 character of the content standing there)
ContentSpan = tuple[int, int, int]


def locate_contents(
    contents: Sequence[str], text: str, render: Callable[[list[str]], str]
) -> list[ContentSpan | None]:
    """Find where each message's content stands in a rendered chat, never mistaking the template's words for it.

    Args:
        contents: The messages' contents, not empty.
        text: The chat rendered with them.
        render: Renders the same chat with other contents.

    Returns:
        One span per content, `None` where the template leaves it out or changes it.
    """
    if not contents:
        return []
    slots = [f"Xslot{i}Slot{len(text)}X" for i in range(len(contents))]
    rendered = render(slots)
    parts = re.split(f"Xslot([0-9]+)Slot{len(text)}X", rendered)
    spans: list[ContentSpan | None] = [None] * len(contents)
    position, matches = len(parts[0]), text.startswith(parts[0])
    for slot, piece in zip(parts[1::2], parts[2::2], strict=True):
        index = int(slot)
        content = contents[index]
        left, right = len(content) - len(content.lstrip()), len(content.rstrip())
        for first, last in ((0, len(content)), (0, right), (left, len(content)), (left, max(left, right))):
            if text.startswith(content[first:last] + piece, position):
                spans[index] = spans[index] or (position, first, last)
                position += last - first + len(piece)
                break
        else:
            matches = False
            break
    if matches and position == len(text):
        return spans
    # The template looks into the contents (a reasoning block cut out, say): put one placeholder at a time.
    return [_locate_one(contents, index, slot, text, render) for index, slot in enumerate(slots)]


def _locate_one(
    contents: Sequence[str], index: int, slot: str, text: str, render: Callable[[list[str]], str]
) -> ContentSpan | None:
    before, _, after = render([*contents[:index], slot, *contents[index + 1 :]]).partition(slot)
    if not (text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)):
        return None
    shown = text[len(before) : len(text) - len(after)]
    first = contents[index].find(shown)
    if shown and contents[index].count(shown) == 1:
        return len(before), first, first + len(shown)
    core = contents[index].strip()
    if core and shown.count(core) == 1:
        first = contents[index].index(core)
        return len(before) + shown.index(core), first, first + len(core)
    return None


def chat_segments(
    receiver_spans: Sequence[ContentSpan | None], sharer_spans: Sequence[ContentSpan | None]
) -> list[Segment]:
    """Pair the contents found on both sides by [`locate_contents`] into segments for [`align_spans`]."""
    segments = []
    for receiver, sharer in zip(receiver_spans, sharer_spans, strict=True):
        if receiver is None or sharer is None:
            continue
        first, last = max(receiver[1], sharer[1]), min(receiver[2], sharer[2])
        if first < last:
            segments.append((receiver[0] + first - receiver[1], sharer[0] + first - sharer[1], last - first))
    return segments


class Chat:
    """One conversation rendered for one model, and where its messages' contents stand in it.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation, from [`plain_messages`].
        chat_template: Replaces the tokenizer's own template.
        template_kwargs: Handed to the template.
        sharer_index: Which sharer reads it; `None` is the receiver. A sharer without a template reads plain text.
        head: Text in front of the first user message, which belongs to no content.

    Raises:
        ValueError: If the template refuses the conversation, or the head has no message to stand in front of.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[dict[str, Any]],
        chat_template: str | None,
        template_kwargs: dict[str, Any],
        sharer_index: int | None = None,
        head: str = "",
    ) -> None:
        self.tokenizer, self.messages, self.chat_template = tokenizer, messages, chat_template
        self.template_kwargs, self.sharer_index, self.head = template_kwargs, sharer_index, head
        self.plain = sharer_index is not None and chat_template is None and not tokenizer.chat_template
        # Only contents that say something have a place to find; a tool call's may be None.
        self.slots = [i for i, message in enumerate(messages) if message.get("content")]
        self.contents = [messages[i]["content"] for i in self.slots]
        if self.plain:
            self.text = head + "\n".join(self.contents)
            return
        self.first = 0
        if head:
            if not self.slots:
                raise ValueError("`sharer_context` needs a message with content to stand in front of.")
            self.first = next((k for k, i in enumerate(self.slots) if messages[i].get("role") == "user"), 0)
            self.contents[self.first] = head + self.contents[self.first]
        self.text = self._render(self.contents)

    def _render(self, contents: list[str]) -> str:
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
            reader, argument = "the receiver", "chat_template"
            if self.sharer_index is not None:
                reader, argument = f"sharer {self.sharer_index}", "sharer_chat_template"
            raise ValueError(
                f"The chat template of {reader} refuses this conversation ({error}): change it or pass `{argument}`."
            ) from error

    @cached_property
    def spans(self) -> list[ContentSpan | None]:
        """Spans of the contents, counted without the head; found once for all sharers."""
        spans: list[ContentSpan | None] = []
        if self.plain:
            start = len(self.head)
            for content in self.contents:
                spans.append((start, 0, len(content)))
                start += len(content) + 1
            return spans
        spans = locate_contents(self.contents, self.text, self._render)
        if self.head and (span := spans[self.first]):
            start, first, last = span
            head = len(self.head)
            cut = max(head - first, 0)
            spans[self.first] = (start + cut, first + cut - head, last - head)
        return spans


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
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


@dataclass(frozen=True)
class ReferenceChat:
    """One chat aligned as the reference does: two rows of equal length, `sections` as `(kind, start, end)`."""

    receiver_ids: list[int]
    sharer_ids: list[int]
    message_mask: list[int]
    receiver_pad: list[int]
    sharer_pad: list[int]
    sections: list[tuple[str, int, int]]


def _chat_sections(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], chat_template: str | None, generation: bool
) -> list[list[int]]:
    """Cut a rendered chat's ids into template, message, template, ...; a token that touches a content is message."""

    def render(contents: list[str]) -> str:
        chat = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        return str(
            tokenizer.apply_chat_template(
                chat, tokenize=False, chat_template=chat_template, add_generation_prompt=generation
            )
        )

    contents = [message["content"] for message in messages]
    text = render(contents)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    ids, sections, done = encoded["input_ids"], [], 0
    for index, span in enumerate(locate_contents(contents, text, render)):
        if span is None:
            raise ValueError(f"`messages[{index}]` does not stand in the rendered chat: its role has no counterpart.")
        touching = np.flatnonzero((starts < span[0] + span[2] - span[1]) & (ends > span[0]))
        first, last = (int(touching[0]), int(touching[-1]) + 1) if len(touching) else (done, done)
        sections += [ids[done:first], ids[first:last]]
        done = last
    return [*sections, ids[done:]]


def reference_chat_alignment(
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    table: torch.Tensor,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
    sharer_chat_template: str | None = None,
) -> ReferenceChat:
    """Align a chat the reference's way (arXiv 2510.03215): template next to template, message through the table.

    Each model keeps its own template; of two template sections the shorter is padded on its right. Kept for
    comparison: the sharer gets no BOS, and template positions read tokens that mean something else.

    Args:
        receiver_tokenizer: Tokenizer of the receiver.
        sharer_tokenizer: Tokenizer of the sharer.
        messages: One conversation, contents as text.
        table: From [`build_token_table`]; the reference's has `unknown="unk", partial_characters="replace"`.
        add_generation_prompt: End with the start of an answer.
        chat_template: Replaces the receiver's own template.
        sharer_chat_template: Replaces the sharer's own template.

    Raises:
        ValueError: If a message is missing from one of the rendered chats.
    """
    receiver = _chat_sections(receiver_tokenizer, messages, chat_template, add_generation_prompt)
    sharer = _chat_sections(sharer_tokenizer, messages, sharer_chat_template, add_generation_prompt)
    result = ReferenceChat([], [], [], [], [], [])
    for index, (ours, theirs) in enumerate(zip(receiver, sharer, strict=True)):
        message = index % 2 == 1
        if message:
            theirs = table[torch.tensor(ours, dtype=torch.long)].tolist()
        start, length = len(result.receiver_ids), max(len(ours), len(theirs))
        result.receiver_ids.extend(ours + [receiver_tokenizer.pad_token_id] * (length - len(ours)))
        result.sharer_ids.extend(theirs + [sharer_tokenizer.pad_token_id] * (length - len(theirs)))
        result.receiver_pad.extend([0] * len(ours) + [1] * (length - len(ours)))
        result.sharer_pad.extend([0] * len(theirs) + [1] * (length - len(theirs)))
        result.message_mask.extend([int(message)] * length)
        result.sections.append(("message" if message else "template", start, start + length))
    return result
