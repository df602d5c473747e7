"""Vocabularies compared, and tables from every receiver token to one sharer token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_c2c import TOKEN_ALIGNMENTS, check_choice, one_per_sharer

REPLACEMENT_CHARACTER = "\ufffd"
#: The order of the reference: where two roles share an id, the later one decides.
ROLES = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")


def decode_each(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode tokens one by one, keeping the leading space that some decoders strip at the start of a text."""
    kwargs = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    vocabulary = tokenizer.get_vocab()
    anchor: list[int] = []
    word = next((i for token, i in vocabulary.items() if token[:1] == "▁" and token[1:].isalpha()), None)
    if word is not None and not str(tokenizer.decode([word], **kwargs)).startswith(" "):
        # Any token serves that decodes to the same text at every position.
        anchor = [next((vocabulary[token] for token in "ae0." if token in vocabulary), word)]
    skipped = len(tokenizer.decode(anchor, **kwargs)) if anchor else 0
    return [text[skipped:] for text in tokenizer.batch_decode([[*anchor, i] for i in ids], **kwargs)]


def _encode_each(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts one by one as if they stood inside a text, where no space is put in front of a word."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    if not tokenizer.is_fast or not tokenizer.tokenize("x")[0].startswith("▁"):
        return encoded
    pending = list(range(len(texts)))
    for anchor in ("=", "§", "¬", "\n"):
        # The tokenizer adds its space in front of the anchor. Texts that merge with an anchor are tried with the next.
        batch = tokenizer(
            [f"{anchor}x", *(anchor + texts[i] for i in pending)],
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
        for i, ids in zip(pending, cut[1:], strict=True):
            encoded[i] = encoded[i] if ids is None else ids
        pending = [i for i, ids in zip(pending, cut[1:], strict=True) if ids is None]
        if not pending:
            break
    return encoded


def same_vocabulary(receiver_tokenizer: PreTrainedTokenizerBase, sharer_tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers give every token the same id, as the `"identity"` alignment needs.

    Tokens that only one of them has added (chat markers of a newer release of a model family) are allowed, as long as
    no id stands for two tokens.
    """
    receiver, sharer = receiver_tokenizer.get_vocab(), sharer_tokenizer.get_vocab()
    if receiver == sharer:
        return True
    common = receiver.keys() & sharer.keys()
    if any(receiver[token] != sharer[token] for token in common):
        return False
    receiver_only, sharer_only = receiver.keys() - common, sharer.keys() - common
    if not (receiver_only | sharer_only) <= {
        *receiver_tokenizer.get_added_vocab(),
        *sharer_tokenizer.get_added_vocab(),
    }:
        return False
    return not {receiver[token] for token in receiver_only} & {sharer[token] for token in sharer_only}


def own_bos_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS id that a tokenizer adds in front of a text by default, or `None` where it adds none."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def resolve_alignments(
    token_alignment: str | Sequence[str | None] | None,
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
    vocab_sizes: Sequence[int] | None = None,
) -> list[str]:
    """Choose each sharer's token alignment.

    Args:
        token_alignment: One for all sharers, or one per sharer. `None`: `"identity"` where a sharer has the receiver's
            vocabulary, else `"span"`.
        tokenizers: The receiver's, then one per sharer. `None` where a model has none.
        vocab_sizes: Number of embeddings of each model, in the same order. Needed where a tokenizer is `None`: such
            vocabularies are the same if their sizes are.

    Returns:
        One of `"identity"`, `"first"`, `"longest"` or `"span"` per sharer.

    Raises:
        ValueError: For an unknown alignment, another number than there are sharers, or `"identity"` between different
            vocabularies.
    """
    receiver = tokenizers[0]
    num_sharers = len(tokenizers) - 1
    wanted: list[str | None] = one_per_sharer("token_alignment", token_alignment, num_sharers)
    resolved = []
    for index, (alignment, sharer) in enumerate(zip(wanted, tokenizers[1:], strict=True)):
        if alignment is not None:
            check_choice("token_alignment", alignment, TOKEN_ALIGNMENTS)
        if alignment is not None and alignment != "identity":
            resolved.append(alignment)
            continue
        sizes = None if vocab_sizes is None else (vocab_sizes[0], vocab_sizes[index + 1])
        if receiver is not None and sharer is not None:
            same = same_vocabulary(receiver, sharer)
            # A token that only the receiver has added needs an embedding of the sharer for its id.
            same = same and (sizes is None or len(receiver) <= sizes[1])
            sizes = sizes or (len(receiver), len(sharer))
        elif sizes is not None:
            same = sizes[0] == sizes[1]
        else:
            raise ValueError("`vocab_sizes` must be given where a tokenizer is None.")
        if alignment == "identity" and not same:
            raise ValueError(
                "`token_alignment='identity'` needs receiver and sharer to have the same vocabulary, but those of the "
                f"receiver ({sizes[0]} tokens) and of sharer {index} ({sizes[1]} tokens) differ; use 'span', 'first' "
                "or 'longest'."
            )
        resolved.append("identity" if same else "span")
    return resolved


def build_token_table(
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    strategy: str = "first",
    unknown: str = "skip",
    partial_characters: str = "skip",
    vocab_size: int | None = None,
) -> torch.LongTensor:
    """Map every receiver token, decoded and encoded again by itself, to one sharer token.

    Args:
        receiver_tokenizer: Tokenizer of the receiver.
        sharer_tokenizer: Tokenizer of the sharer.
        strategy: Which of several sharer tokens is taken: the `"first"`, or the `"longest"` in characters.
        unknown: A token without a counterpart maps to -1 (`"skip"`) or to the sharer's unknown token (`"unk"`).
        partial_characters: A token that holds only a part of a character maps to -1 (`"skip"`) or, as in the
            reference, to the sharer's token for the replacement character (`"replace"`).
        vocab_size: Length of the table: the number of the receiver's embeddings. `None`: that of the vocabulary.

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
    """Map receiver ids to sharer ids by a table; runs on any device, without a loop or a host synchronisation.

    Args:
        table: From [`build_token_table`], `(vocab_size,)`.
        input_ids: Receiver ids, `(batch_size, seq_len)`, padded on either side.
        attention_mask: 1 at real tokens, `(batch_size, seq_len)`.
        bos_token_id: The sharer's BOS, put in front of each row's first real token unless that token maps to it.

    Returns:
        Sharer ids and sharer mask, `(batch_size, seq_len)` or with BOS `(batch_size, seq_len + 1)`, and the alignment:
        for every receiver position the sharer position or -1, `(batch_size, seq_len)`. All int64.
    """
    table = table.to(input_ids.device)
    real = attention_mask.bool()
    known = (input_ids >= 0) & (input_ids < table.shape[0])
    mapped = table[input_ids.clamp(0, table.shape[0] - 1)]
    aligned = real & known & (mapped >= 0)
    # `masked_fill` hands scalars to the kernel: nothing is copied from the host.
    sharer_ids = mapped.masked_fill(~aligned, 0)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if bos_token_id is None or input_ids.shape[1] == 0:
        return sharer_ids, aligned.long(), positions.masked_fill(~aligned, -1)
    first = real.int().argmax(dim=1, keepdim=True)
    has_bos = aligned.gather(1, first) & (sharer_ids.gather(1, first) == bos_token_id)
    add_bos = real.any(dim=1, keepdim=True) & ~has_bos
    # One more column in front moves every token right by one, which frees the position before the first real token.
    sharer_ids = torch.nn.functional.pad(sharer_ids, (1, 0)).scatter(1, first, add_bos.long() * bos_token_id)
    sharer_mask = torch.nn.functional.pad(aligned.long(), (1, 0)).scatter(1, first, add_bos.long())
    return sharer_ids, sharer_mask, (positions + 1).masked_fill(~aligned, -1)
