"""Chats rendered with each model's own template, and the position of every message's content in the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from .spans import Segment

Message = Mapping[str, Any]
#: Where a content is in a rendered chat: the start, and which of the content's characters `[first, last)` are there.
ContentSpan = tuple[int, int, int]


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copy messages, with text parts joined.

    Raises:
        ValueError: A content is neither text nor a list of text parts.
    """
    plain = []
    for message in messages:
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            if not isinstance(content, list | tuple) or not all(map(_is_text_part, content)):
                raise ValueError(
                    "`content` of a message must be text or a list of parts of type 'text', each with its `text`, but "
                    f"got {content!r:.80}."
                )
            content = "".join(part["text"] for part in content)
        plain.append({**message, "content": content} if "content" in message else dict(message))
    return plain


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def locate_contents(
    contents: Sequence[str], text: str, render: Callable[[list[str]], str]
) -> list[ContentSpan | None]:
    """Find the position of each message's content in a rendered chat, not of equal words in the template.

    Args:
        contents: The messages' contents, not empty.
        text: The chat rendered with them.
        render: Renders the same chat with other contents.

    Returns:
        One span per content, `None` where the template omits or changes it.
    """
    if not contents:
        return []
    placeholders = [f"Xcontent{i}Content{len(text)}X" for i in range(len(contents))]
    rendered = render(placeholders)
    parts = re.split(f"Xcontent([0-9]+)Content{len(text)}X", rendered)
    spans: list[ContentSpan | None] = [None] * len(contents)
    position, matches = len(parts[0]), text.startswith(parts[0])
    for placeholder, piece in zip(parts[1::2], parts[2::2], strict=True):
        index = int(placeholder)
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
    # The template edits contents (removes a reasoning block, say): use one placeholder at a time.
    return [_locate_one(contents, index, placeholder, text, render) for index, placeholder in enumerate(placeholders)]


def _locate_one(
    contents: Sequence[str], index: int, placeholder: str, text: str, render: Callable[[list[str]], str]
) -> ContentSpan | None:
    before, _, after = render([*contents[:index], placeholder, *contents[index + 1 :]]).partition(placeholder)
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


class RenderedChat:
    """One conversation rendered for one model.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation, from [`plain_messages`].
        chat_template: Replaces the tokenizer's own template.
        template_kwargs: Arguments of the template.
        sharer_index: For which sharer; `None`: for the receiver. A sharer without a template gets the contents as
            plain text, one per line.
        prefix: Text in front of the first user message's content, which is no part of that content.

    Attributes:
        text: The rendered chat.

    Raises:
        ValueError: The template refuses the conversation, or no message has a content for the prefix.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[dict[str, Any]],
        chat_template: str | None,
        template_kwargs: dict[str, Any],
        sharer_index: int | None = None,
        prefix: str = "",
    ) -> None:
        self._tokenizer, self._messages, self._chat_template = tokenizer, messages, chat_template
        self._template_kwargs, self._sharer_index, self._prefix = template_kwargs, sharer_index, prefix
        self._is_plain = sharer_index is not None and chat_template is None and not tokenizer.chat_template
        # Empty contents have no position to find, and the content of a tool call may be None.
        self._indices = [i for i, message in enumerate(messages) if message.get("content")]
        self._contents: list[str] = [messages[i]["content"] for i in self._indices]
        self._prefixed = 0
        if self._is_plain:
            self.text = prefix + "\n".join(self._contents)
            return
        if prefix:
            if not self._indices:
                raise ValueError("`sharer_context` needs a message with content to be put in front of.")
            self._prefixed = self._first_user_content()
            self._contents[self._prefixed] = prefix + self._contents[self._prefixed]
        self.text = self._render(self._contents)

    def _first_user_content(self) -> int:
        """Return the index among the contents of the first user message's; of the first one where there is none."""
        return next((k for k, i in enumerate(self._indices) if self._messages[i].get("role") == "user"), 0)

    def context_start(self) -> int:
        """Return the character in front of which a context goes: the start of the first user message's content.

        Raises:
            ValueError: No message has a content, or the template changes that one.
        """
        if not self._indices:
            raise ValueError("`sharer_context` needs a message with content to be put in front of.")
        span = self.spans[self._first_user_content()]
        if span is None:
            raise ValueError(
                "The chat template of the receiver changes the first user message, so that `sharer_context` has no "
                "place in front of it: pass `chat_template`."
            )
        return span[0]

    def _render(self, contents: list[str]) -> str:
        messages = [dict(message) for message in self._messages]
        for i, content in zip(self._indices, contents, strict=True):
            messages[i]["content"] = content
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, chat_template=self._chat_template, **self._template_kwargs
                )
            )
        except TemplateError as error:
            model, argument = "the receiver", "chat_template"
            if self._sharer_index is not None:
                model, argument = f"sharer {self._sharer_index}", "sharer_chat_template"
            raise ValueError(
                f"The chat template of {model} refuses this conversation ({error}): change it or pass `{argument}`."
            ) from error

    @cached_property
    def spans(self) -> list[ContentSpan | None]:
        """One span per content that is not empty, prefix excluded; `None` where the template omits or changes it."""
        spans: list[ContentSpan | None] = []
        if self._is_plain:
            start = len(self._prefix)
            for content in self._contents:
                spans.append((start, 0, len(content)))
                start += len(content) + 1
            return spans
        spans = locate_contents(self._contents, self.text, self._render)
        if self._prefix and (span := spans[self._prefixed]):
            start, first, last = span
            length = len(self._prefix)
            cut = max(length - first, 0)
            spans[self._prefixed] = (start + cut, first + cut - length, last - length)
        return spans
