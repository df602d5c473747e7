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
    """

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
        raise ImportError("`alignment_report` needs sacrebleu: pip install 'c2c-hf[eval]'.") from error
    check_choice("token_alignment", token_alignment, TOKEN_ALIGNMENTS)
    if token_alignment in ("first", "longest") and table is None:
        table = build_token_table(receiver_tokenizer, sharer_tokenizer, token_alignment)
    positions = aligned = exact = lost = 0
    remapped = []
    for text in texts:
        ids = receiver_tokenizer(text, add_special_tokens=False)["input_ids"]
        if token_alignment == "span":
            receiver, sharer = (
                tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                for tokenizer in (receiver_tokenizer, sharer_tokenizer)
            )
            spans, sharer_spans = receiver["offset_mapping"], sharer["offset_mapping"]
            alignment = align_spans(spans, sharer_spans, [(0, 0, len(text))])
            exact += sum(tuple(spans[i]) == tuple(sharer_spans[p]) for i, p in enumerate(alignment) if p >= 0)
            aligned += int((alignment >= 0).sum())
            kept = [sharer["input_ids"][p] for p in sorted(set(alignment[alignment >= 0].tolist()))]
        else:
            mapped = ids if table is None else table[torch.tensor(ids, dtype=torch.long)].tolist()
            kept = [i for i in mapped if i >= 0]
            aligned += len(kept)
            texts_aligned = decode_each(receiver_tokenizer, [i for i, m in zip(ids, mapped, strict=True) if m >= 0])
            exact += sum(a == b for a, b in zip(texts_aligned, decode_each(sharer_tokenizer, kept), strict=True))
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
