"""Two tokenizations of one text: for each receiver token, the sharer token or position it reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_c2c import TOKEN_ALIGNMENTS, check_choice, one_per_sharer

REPLACEMENT_CHARACTER = "\ufffd"
#: The order of the reference: where two roles share an id, the later one decides.
ROLES = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")

#: (start on the receiver's side, start on the sharer's side, number of characters)
Segment = tuple[int, int, int]


def decode_each(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
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
            None
            if any(start < 1 < end for start, end in offsets)
            else [i for i, (start, _) in zip(ids, offsets, strict=True) if start >= 1]
            for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
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
    check_choice("strategy", strategy, ("first", "longest"))
    check_choice("unknown", unknown, ("skip", "unk"))
    check_choice("partial_characters", partial_characters, ("skip", "replace"))
    vocabulary = receiver_tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    no_counterpart = -1
    if unknown == "unk" and sharer_tokenizer.unk_token_id is not None:
        no_counterpart = sharer_tokenizer.unk_token_id

    texts = decode_each(receiver_tokenizer, range(size))
    pieces = _encode_each(sharer_tokenizer, texts)
    lengths: dict[int, int] = {}
    if strategy == "longest":
        several = sorted({i for candidates in pieces if len(candidates) > 1 for i in candidates})
        lengths = dict(zip(several, map(len, decode_each(sharer_tokenizer, several)), strict=True))
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
    # Scalars go in through `masked_fill`, which hands them to the kernel: nothing is copied from the host.
    sharer_ids = mapped.masked_fill(~read, 0)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if bos_token_id is None or input_ids.shape[1] == 0:
        return sharer_ids, read.long(), positions.masked_fill(~read, -1)
    first = real.int().argmax(dim=1, keepdim=True)
    has_start = read.gather(1, first) & (sharer_ids.gather(1, first) == bos_token_id)
    add = real.any(dim=1, keepdim=True) & ~has_start
    # One more column in front moves every token right by one; the slot left of the first real token is free.
    sharer_ids = torch.nn.functional.pad(sharer_ids, (1, 0)).scatter(1, first, add.long() * bos_token_id)
    sharer_mask = torch.nn.functional.pad(read.long(), (1, 0)).scatter(1, first, add.long())
    return sharer_ids, sharer_mask, (positions + 1).masked_fill(~read, -1)


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
    # `fromiter` reads a long list of pairs several times faster than `asarray`.
    receiver, sharer = (
        np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
        for offsets in (receiver_offsets, sharer_offsets)
    )
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


def resolve_alignments(
    token_alignment: str | Sequence[str | None] | None,
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
    num_embeddings: Sequence[int] | None = None,
) -> list[str]:
    """Choose the token alignment of each sharer.

    Args:
        token_alignment: One for all sharers, or one per sharer. `None`: `"identity"` between equal vocabularies, else
            `"span"`.
        tokenizers: The receiver's, then each sharer's; `None` where there is none.
        num_embeddings: Number of embeddings of each model, which decides where a tokenizer is missing.

    Raises:
        ValueError: For an unknown alignment, another number of them, or `identity` between different vocabularies.
    """
    receiver, *sharers = tokenizers
    resolved = []
    wanted = one_per_sharer("token_alignment", token_alignment, len(sharers))
    for index, (alignment, sharer) in enumerate(zip(wanted, sharers, strict=True), start=1):
        if alignment is not None:
            check_choice("token_alignment", alignment, TOKEN_ALIGNMENTS)
        sizes = [len(tokenizer) if tokenizer is not None else 0 for tokenizer in (receiver, sharer)]
        if receiver is None or sharer is None:
            sizes = [num_embeddings[0], num_embeddings[index]] if num_embeddings is not None else sizes
            same = sizes[0] == sizes[1]
        else:
            # A receiver's added token is harmless to a sharer that lacks it, if there is an embedding for its id.
            same = same_vocabulary(receiver, sharer) and (num_embeddings is None or sizes[0] <= num_embeddings[index])
        if alignment == "identity" and not same:
            raise ValueError(
                f"`token_alignment='identity'` needs one vocabulary, but the receiver's ({sizes[0]} tokens) and that "
                f"of sharer {index - 1} ({sizes[1]} tokens) differ; use 'span', 'first' or 'longest'."
            )
        resolved.append(alignment or ("identity" if same else "span"))
    return resolved
