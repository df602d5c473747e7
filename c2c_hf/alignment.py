"""Two tokenizations of one text: for each receiver token, the sharer token or position it reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

REPLACEMENT_CHARACTER = "\ufffd"
#: The order of the reference: where two roles share an id, the later one decides.
ROLES = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")

#: (start in the rendered text, first and last + 1 character of the content standing there)
ContentSpan = tuple[int, int, int]
#: (start on the receiver's side, start on the sharer's side, number of characters)
Segment = tuple[int, int, int]


def _check(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def _decode_each(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode tokens one by one, keeping the leading space that some decoders strip at the start of a text."""
    kwargs = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    vocabulary = tokenizer.get_vocab()
    anchor: list[int] = []
    word = next((i for token, i in vocabulary.items() if token[:1] == "▁" and token[1:].isalpha()), None)
    if word is not None and not str(tokenizer.decode([word], **kwargs)).startswith(" "):
        # Any token serves that decodes to the same text wherever it stands.
        anchor = [next((vocabulary[token] for token in "ae0." if token in vocabulary), word)]
    skipped = len(tokenizer.decode(anchor, **kwargs)) if anchor else 0
    return [text[skipped:] for text in tokenizer.batch_decode([[*anchor, i] for i in ids], **kwargs)]


def _encode_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts one by one as if they stood inside a text, where no space is put in front of a word."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    if not tokenizer.is_fast or not tokenizer.tokenize("x")[0].startswith("▁"):
        return encoded
    waiting = list(range(len(texts)))
    for anchor in ("=", "§", "¬", "\n"):
        # The anchor takes the space that the tokenizer adds; it serves where it does not merge with the text.
        batch = tokenizer(
            [f"{anchor}x", *(anchor + texts[i] for i in waiting)],
            add_special_tokens=False,
            return_offsets_mapping=True,
        )
        cut = [
            None if any(start < 1 < end for start, end in offsets) else [i for i, (start, _) in pairs if start >= 1]
            for offsets, pairs in (
                (offsets, list(zip(ids, offsets, strict=True)))
                for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
            )
        ]
        if not cut[0] or str(tokenizer.convert_ids_to_tokens(cut[0][0])).startswith("▁"):
            continue
        for i, ids in zip(waiting, cut[1:], strict=True):
            encoded[i] = encoded[i] if ids is None else ids
        waiting = [i for i, ids in zip(waiting, cut[1:], strict=True) if ids is None]
        if not waiting:
            break
    return encoded


def same_vocabulary(receiver_tokenizer: PreTrainedTokenizerBase, sharer_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether two tokenizers give every token the same id, as `identity` alignment needs.

    Tokens that only one of them has added (chat markers of a newer release of a model family) make no difference, as
    long as no id means two things.
    """
    receiver, sharer = receiver_tokenizer.get_vocab(), sharer_tokenizer.get_vocab()
    if receiver == sharer:
        return True
    common = receiver.keys() & sharer.keys()
    if any(receiver[token] != sharer[token] for token in common):
        return False
    own, other = receiver.keys() - common, sharer.keys() - common
    if not (own | other) <= {*receiver_tokenizer.get_added_vocab(), *sharer_tokenizer.get_added_vocab()}:
        return False
    return not {receiver[token] for token in own} & {sharer[token] for token in other}


def own_bos_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS that a tokenizer writes in front of a text by itself, or `None` where it writes none."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def build_token_table(
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    strategy: str = "first",
    unknown: str = "skip",
    partial_characters: str = "skip",
    vocab_size: int | None = None,
) -> torch.LongTensor:
    """Map every receiver token, decoded alone and encoded alone, to one sharer token.

    Args:
        receiver_tokenizer: Tokenizer of the receiver.
        sharer_tokenizer: Tokenizer of the sharer.
        strategy: Which of several sharer tokens is taken: the `"first"`, or the `"longest"` in characters.
        unknown: A token without a counterpart reads nothing (`"skip"`) or the sharer's unknown token (`"unk"`).
        partial_characters: A token that holds a part of a character only reads nothing (`"skip"`) or, as in the
            reference, what the sharer makes of the replacement character (`"replace"`).
        vocab_size: Length of the table: the number of the receiver's embeddings, where it is not the vocabulary's.

    Returns:
        Sharer ids of shape `(vocab_size,)`, int64, -1 where the token has no counterpart.

    Raises:
        ValueError: For an unknown option.
    """
    _check("strategy", strategy, ("first", "longest"))
    _check("unknown", unknown, ("skip", "unk"))
    _check("partial_characters", partial_characters, ("skip", "replace"))
    vocabulary = receiver_tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    no_counterpart = -1
    if unknown == "unk" and sharer_tokenizer.unk_token_id is not None:
        no_counterpart = sharer_tokenizer.unk_token_id

    texts = _decode_each(receiver_tokenizer, range(size))
    pieces = _encode_each(sharer_tokenizer, texts)
    lengths: dict[int, int] = {}
    if strategy == "longest":
        several = sorted({i for candidates in pieces if len(candidates) > 1 for i in candidates})
        lengths = dict(zip(several, map(len, _decode_each(sharer_tokenizer, several)), strict=True))
    table = [
        no_counterpart if not c else c[0] if strategy == "first" or len(c) == 1 else max(c, key=lengths.__getitem__)
        for c in pieces
    ]
    if partial_characters == "skip":
        doubtful = [i for i, text in enumerate(texts) if REPLACEMENT_CHARACTER in text]
        again = _encode_each(receiver_tokenizer, [texts[i] for i in doubtful]) if doubtful else []
        for i, ids in zip(doubtful, again, strict=True):
            # A token of the true replacement character encodes back to itself; a cut character does not.
            if ids != [i]:
                table[i] = -1

    special = {i for i, token in receiver_tokenizer.added_tokens_decoder.items() if token.special}
    sharer_vocabulary = sharer_tokenizer.get_vocab()
    for i in special | set(receiver_tokenizer.all_special_ids):
        table[i] = sharer_vocabulary.get(str(receiver_tokenizer.convert_ids_to_tokens(i)), no_counterpart)
    for role in ROLES:
        receiver_id, sharer_id = getattr(receiver_tokenizer, role), getattr(sharer_tokenizer, role)
        if receiver_id is not None and sharer_id is not None:
            table[receiver_id] = sharer_id
    for i in set(range(size)).difference(vocabulary.values()):
        table[i] = -1
    wanted = size if vocab_size is None else vocab_size
    return torch.tensor(table[:wanted] + [-1] * (wanted - size), dtype=torch.long)  # type: ignore[return-value]


def apply_token_table(
    table: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, bos_token_id: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Translate receiver ids token by token; runs on any device, without a loop or a host synchronisation.

    Args:
        table: From [`build_token_table`], `(vocab_size,)`.
        input_ids: Receiver ids, `(batch_size, seq_len)`, padded on either side.
        attention_mask: 1 at real tokens, `(batch_size, seq_len)`.
        bos_token_id: The sharer's BOS, put in front of each row's first real token unless that token maps to it.

    Returns:
        Sharer ids, sharer mask, `(batch_size, seq_len)` or with BOS `(batch_size, seq_len + 1)`, and for every
        receiver position the sharer position it reads or -1, `(batch_size, seq_len)`.
    """
    table = table.to(input_ids.device)
    real = attention_mask.bool()
    known = (input_ids >= 0) & (input_ids < table.shape[0])
    mapped = table[input_ids.clamp(0, table.shape[0] - 1)]
    read = real & known & (mapped >= 0)
    sharer_ids = torch.where(read, mapped, 0)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    if bos_token_id is None or input_ids.shape[1] == 0:
        return sharer_ids, read.long(), torch.where(read, positions, -1)
    first = real.int().argmax(dim=1, keepdim=True)
    has_start = read.gather(1, first) & (sharer_ids.gather(1, first) == bos_token_id)
    add = real.any(dim=1, keepdim=True) & ~has_start
    # One more column in front moves every token right by one; the slot left of the first real token is free.
    sharer_ids = torch.nn.functional.pad(sharer_ids, (1, 0)).scatter(1, first, add.long() * bos_token_id)
    sharer_mask = torch.nn.functional.pad(read.long(), (1, 0)).scatter(1, first, add.long())
    return sharer_ids, sharer_mask, torch.where(read, positions + 1, -1)


def mask_last_position(alignment: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Set each row's last real position to -1: the last prompt token never fuses. Both `(batch_size, seq_len)`."""
    if alignment.shape[1] == 0:
        return alignment
    last = alignment.shape[1] - 1 - attention_mask.flip(1).int().argmax(dim=1, keepdim=True)
    return alignment.scatter(1, last, -1)


def align_spans(
    receiver_offsets: Sequence[tuple[int, int]],
    sharer_offsets: Sequence[tuple[int, int]],
    segments: Sequence[Segment],
) -> np.ndarray:
    """Give each receiver token the last sharer token that covers its last character.

    Args:
        receiver_offsets: Character spans of the receiver's tokens in its text; empty for special tokens.
        sharer_offsets: The same for the sharer in its own text.
        segments: `(receiver_start, sharer_start, length)` runs of characters that both texts share.

    Returns:
        Sharer positions, `(number of receiver tokens,)`, -1 where there is none: outside every segment, an empty span,
        or a character no sharer token covers.
    """
    receiver = np.asarray(receiver_offsets, dtype=np.int64).reshape(-1, 2)
    sharer = np.asarray(sharer_offsets, dtype=np.int64).reshape(-1, 2)
    runs = np.asarray(sorted(s for s in segments if s[2] > 0), dtype=np.int64).reshape(-1, 3)
    result = np.full(len(receiver), -1, dtype=np.int64)
    if not len(receiver) or not len(sharer) or not len(runs):
        return result
    # Every sharer character names its last token: byte tokens share one character, and normalizers may reorder.
    widths = np.maximum(sharer[:, 1] - sharer[:, 0], 0)
    tokens = np.repeat(np.arange(len(sharer)), widths)
    characters = np.repeat(sharer[:, 0] - np.cumsum(widths) + widths, widths) + np.arange(widths.sum())
    owner = np.full(int(max(sharer[:, 1].max(), (runs[:, 1] + runs[:, 2]).max())), -1, dtype=np.int64)
    np.maximum.at(owner, characters, tokens)

    end = receiver[:, 1] - 1
    run = np.searchsorted(runs[:, 0], end, side="right") - 1
    start, sharer_start, length = runs[np.maximum(run, 0)].T
    inside = (run >= 0) & (end - start < length) & (receiver[:, 1] > receiver[:, 0])
    result[inside] = owner[(end - start + sharer_start)[inside]]
    return result


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


@dataclass(frozen=True)
class AlignmentReport:
    """How well an alignment carries texts over: shares in 0..1, BLEU and chrF of the remapped text in 0..100."""

    num_positions: int
    aligned: float
    one_to_one: float
    characters_lost: float
    bleu: float
    chrf: float


def alignment_report(
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    token_alignment: str = "span",
    table: torch.Tensor | None = None,
) -> AlignmentReport:
    """Measure an alignment on plain texts, without special tokens.

    `aligned` is the share of positions that read a token, `one_to_one` the share that read exactly their own text,
    `characters_lost` the share of characters missing from the text of the tokens read (the remapped text).

    Args:
        receiver_tokenizer: Tokenizer of the receiver.
        sharer_tokenizer: Tokenizer of the sharer.
        texts: Texts to measure on.
        token_alignment: `"identity"`, `"first"`, `"longest"` or `"span"`.
        table: A table built before, for `"first"` and `"longest"`.

    Raises:
        ImportError: Without sacrebleu.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("`alignment_report` needs sacrebleu: pip install 'c2c-hf[eval]'.") from error
    _check("token_alignment", token_alignment, ("identity", "first", "longest", "span"))
    if token_alignment in ("first", "longest") and table is None:
        table = build_token_table(receiver_tokenizer, sharer_tokenizer, token_alignment)
    positions = aligned = exact = lost = 0
    remapped = []
    for text in texts:
        ids = receiver_tokenizer(text, add_special_tokens=False)["input_ids"]
        if token_alignment == "span":
            spans = receiver_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            sharer = sharer_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            read = align_spans(spans, sharer["offset_mapping"], [(0, 0, len(text))])
            exact += sum(tuple(spans[i]) == tuple(sharer["offset_mapping"][p]) for i, p in enumerate(read) if p >= 0)
            aligned += int((read >= 0).sum())
            kept = [sharer["input_ids"][p] for p in sorted(set(read[read >= 0].tolist()))]
        else:
            mapped = ids if table is None else table[torch.tensor(ids, dtype=torch.long)].tolist()
            kept = [i for i in mapped if i >= 0]
            aligned += len(kept)
            ours = _decode_each(receiver_tokenizer, [i for i, m in zip(ids, mapped, strict=True) if m >= 0])
            exact += sum(a == b for a, b in zip(ours, _decode_each(sharer_tokenizer, kept), strict=True))
        positions += len(ids)
        remapped.append(str(sharer_tokenizer.decode(kept, clean_up_tokenization_spaces=False)))
        lost += (Counter(text) - Counter(remapped[-1])).total()
    return AlignmentReport(
        num_positions=positions,
        aligned=aligned / max(positions, 1),
        one_to_one=exact / max(positions, 1),
        characters_lost=lost / max(sum(map(len, texts)), 1),
        bleu=sacrebleu.corpus_bleu(remapped, [list(texts)]).score,
        chrf=sacrebleu.corpus_chrf(remapped, [list(texts)]).score,
    )
