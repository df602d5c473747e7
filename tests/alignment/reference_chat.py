"""The reference's alignment of a chat (arXiv 2510.03215), for comparison: template to template, message by table."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from c2c_hf.alignment.chat_template import locate_contents


@dataclass(frozen=True)
class ReferenceChat:
    """One chat aligned as the reference does: two rows of equal length, `sections` as `(kind, start, end)`."""

    receiver_ids: list[int]
    sharer_ids: list[int]
    message_mask: list[int]
    receiver_pad: list[int]
    sharer_pad: list[int]
    sections: list[tuple[str, int, int]]


def chat_sections(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], chat_template: str | None, generation: bool
) -> list[list[int]]:
    """A rendered chat's ids cut into template, message, template, ...; a token that overlaps a content is message."""

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
            raise ValueError(f"`messages[{index}]` is not in the rendered chat: its role has no counterpart.")
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
    """Align a chat as the reference does: template with template, each message through the table.

    Each model keeps its own template; of two template sections the shorter is padded on its right. The sharer gets no
    BOS, and template positions are aligned with unrelated tokens.

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
    receiver = chat_sections(receiver_tokenizer, messages, chat_template, add_generation_prompt)
    sharer = chat_sections(sharer_tokenizer, messages, sharer_chat_template, add_generation_prompt)
    result = ReferenceChat([], [], [], [], [], [])
    for index, (receiver_ids, sharer_ids) in enumerate(zip(receiver, sharer, strict=True)):
        message = index % 2 == 1
        if message:
            sharer_ids = table[torch.tensor(receiver_ids, dtype=torch.long)].tolist()
        start, length = len(result.receiver_ids), max(len(receiver_ids), len(sharer_ids))
        result.receiver_ids.extend(receiver_ids + [receiver_tokenizer.pad_token_id] * (length - len(receiver_ids)))
        result.sharer_ids.extend(sharer_ids + [sharer_tokenizer.pad_token_id] * (length - len(sharer_ids)))
        result.receiver_pad.extend([0] * len(receiver_ids) + [1] * (length - len(receiver_ids)))
        result.sharer_pad.extend([0] * len(sharer_ids) + [1] * (length - len(sharer_ids)))
        result.message_mask.extend([int(message)] * length)
        result.sections.append(("message" if message else "template", start, start + length))
    return result
