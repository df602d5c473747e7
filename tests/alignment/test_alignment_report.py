"""The alignment report."""

import pytest
from tokenizers_for_tests import (
    TEXT,
    byte_level_tokenizer,
    metaspace_tokenizer,
    unigram_tokenizer,
    wordpiece_tokenizer,
)

from c2c_hf.alignment.report import alignment_report


def test_report_of_a_perfect_and_of_a_lossy_alignment() -> None:
    pytest.importorskip("sacrebleu")
    tokenizer = byte_level_tokenizer()
    perfect = alignment_report(tokenizer, byte_level_tokenizer(), TEXT, "span")
    assert perfect.aligned == 1
    assert perfect.characters_lost < 0.1
    identity = alignment_report(tokenizer, byte_level_tokenizer(), TEXT, "identity")
    assert (identity.aligned, identity.one_to_one, identity.characters_lost) == (1, 1, 0)
    assert identity.chrf == pytest.approx(100)
    assert identity.bleu == pytest.approx(100)
    lossy = alignment_report(byte_level_tokenizer(400), byte_level_tokenizer(280), TEXT, "first")
    longest = alignment_report(byte_level_tokenizer(400), byte_level_tokenizer(280), TEXT, "longest")
    assert 0 < longest.characters_lost <= lossy.characters_lost < 1
    assert lossy.bleu < 100 and lossy.chrf < 100


KINDS = {
    "byte-level": byte_level_tokenizer,
    "byte fallback": metaspace_tokenizer,
    "WordPiece": wordpiece_tokenizer,
    "Unigram": unigram_tokenizer,
}


@pytest.mark.parametrize("sharer", KINDS)
@pytest.mark.parametrize("receiver", KINDS)
def test_every_kind_of_tokenizer(receiver: str, sharer: str) -> None:
    """Only what a vocabulary lacks fails; WordPiece has no token for a space."""
    pytest.importorskip("sacrebleu")
    is_wordpiece, knows_all = sharer == "WordPiece", sharer in ("byte-level", "byte fallback")
    for alignment in ("span", "first", "longest"):
        words = alignment_report(KINDS[receiver](), KINDS[sharer](), TEXT[:1], alignment)
        assert 0 <= words.one_to_one <= 1 and 0 <= words.characters_lost < 0.8
        assert words.aligned == pytest.approx(1 - len(words.failures) / words.num_positions)
        assert is_wordpiece or words.aligned == 1
        assert all(failure.token.strip() == "" for failure in words.failures)
    others = alignment_report(KINDS[receiver](), KINDS[sharer](), TEXT[3:], "span")
    unknown = [failure for failure in others.failures if failure.reason == "unknown token"]
    assert bool(unknown) != knows_all
    assert knows_all or any("北" in failure.context for failure in unknown)
    assert is_wordpiece or len(unknown) == len(others.failures)


def test_failures_are_listed_with_their_text() -> None:
    pytest.importorskip("sacrebleu")
    text = "the keeper said 🎉 hello"
    report = alignment_report(wordpiece_tokenizer(), wordpiece_tokenizer(), [text], "span")
    (failure,) = report.failures
    assert (failure.token.strip(), failure.reason) == ("[UNK]", "unknown token")
    assert failure.context == text
    table = alignment_report(byte_level_tokenizer(), wordpiece_tokenizer(), ["ß"], "first")
    assert [failure.reason for failure in table.failures] == ["no counterpart"] * 2, "two halves of a character"
