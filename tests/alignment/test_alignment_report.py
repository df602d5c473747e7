"""The alignment report."""

import pytest
from tokenizers_for_tests import TEXT, byte_level_tokenizer

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
