"""Quality of a token alignment, measured on plain texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_c2c import TOKEN_ALIGNMENTS, check_choice
from .spans import align_spans
from .token_table import build_token_table, decode_each

#: Characters on either side of a failure that are shown.
_CONTEXT = 20


@dataclass(frozen=True)
class AlignmentFailure:
    """A receiver token that nothing of the sharer stands for.

    Attributes:
        token: The token as it decodes by itself: a replacement character for a part of a character.
        context: The text around it; its start, where the receiver's tokenizer is no fast one.
        reason: `"no counterpart"`, or `"unknown token"`: the sharer's tokenizer has no token for it.
    """

    token: str
    context: str
    reason: str


@dataclass(frozen=True)
class AlignmentReport:
    """Quality of a token alignment, see [`alignment_report`].

    Attributes:
        num_positions: Number of receiver tokens.
        aligned: Share of positions that are aligned with a sharer token, 0..1.
        one_to_one: Share of positions whose sharer token holds exactly the same text, 0..1.
        characters_lost: Share of characters that the remapped text lacks, 0..1.
        bleu: Of the remapped text against the original, 0..100.
        chrf: Likewise, 0..100.
        failures: In the order of the texts.
    """

    num_positions: int
    aligned: float
    one_to_one: float
    characters_lost: float
    bleu: float
    chrf: float
    failures: list[AlignmentFailure]


def alignment_report(
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    token_alignment: str = "span",
    table: torch.Tensor | None = None,
) -> AlignmentReport:
    """Measure an alignment on plain texts, without special tokens.

    The remapped text is the text of the sharer tokens that receiver positions are aligned with.

    Args:
        receiver_tokenizer: Tokenizer of the receiver.
        sharer_tokenizer: Tokenizer of the sharer.
        texts: Texts to measure on.
        token_alignment: `"identity"`, `"first"`, `"longest"` or `"span"`.
        table: A table built before, for `"first"` and `"longest"`.

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: For an unknown alignment.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("`alignment_report` needs sacrebleu: pip install 'c2c-hf[analysis]'.") from error
    check_choice("token_alignment", token_alignment, TOKEN_ALIGNMENTS)
    if token_alignment in ("first", "longest") and table is None:
        table = build_token_table(receiver_tokenizer, sharer_tokenizer, token_alignment)
    positions = aligned = exact = lost = 0
    remapped: list[str] = []
    failures: list[AlignmentFailure] = []
    unknown_id = sharer_tokenizer.unk_token_id
    for text in texts:
        encoded = receiver_tokenizer(text, add_special_tokens=False, return_offsets_mapping=receiver_tokenizer.is_fast)
        # Only fast tokenizers know where their tokens stand; the other alignments need no places.
        ids, spans = encoded["input_ids"], encoded.get("offset_mapping")
        if token_alignment == "span":
            sharer = sharer_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            sharer_spans = sharer["offset_mapping"]
            alignment = align_spans(spans, sharer_spans, [(0, 0, len(text))])
            exact += sum(tuple(spans[i]) == tuple(sharer_spans[p]) for i, p in enumerate(alignment) if p >= 0)
            aligned += int((alignment >= 0).sum())
            kept = [sharer["input_ids"][p] for p in sorted(set(alignment[alignment >= 0].tolist()))]
            mapped = [sharer["input_ids"][p] if p >= 0 else -1 for p in alignment]
        else:
            mapped = ids if table is None else table[torch.tensor(ids, dtype=torch.long)].tolist()
            kept = [i for i in mapped if i >= 0]
            aligned += len(kept)
            texts_aligned = decode_each(receiver_tokenizer, [i for i, m in zip(ids, mapped, strict=True) if m >= 0])
            exact += sum(a == b for a, b in zip(texts_aligned, decode_each(sharer_tokenizer, kept), strict=True))
        failed = [i for i, m in enumerate(mapped) if m < 0 or (m == unknown_id and mapped is not ids)]
        decoded = decode_each(receiver_tokenizer, [ids[i] for i in failed])
        for i, token in zip(failed, decoded, strict=True):
            start, end = (0, _CONTEXT) if spans is None else spans[i]
            context = text[max(0, start - _CONTEXT) : end + _CONTEXT]
            failures.append(AlignmentFailure(token, context, "no counterpart" if mapped[i] < 0 else "unknown token"))
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
        failures=failures,
    )
