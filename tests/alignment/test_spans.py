"""Character spans: which sharer position each receiver token is aligned with."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from c2c_hf.alignment.spans import align_spans

REFERENCE = Path(__file__).parents[1] / "data" / "alignment" / "alignment.json"
SAMPLES = [
    *TEXT,
    "  two leading spaces,\ttabs\tand   1,234,567.89 € — “quotes” …",
    "👩‍🚀👨‍👩‍👧‍👦 龘 e\u0301 北京🎉 x",
    "ﬁ ½ \u00a0 \r\n\r\n\tif (a[i] != 0x1F) { /* naïve */ }",
]
PAIRS = [
    (byte_level_tokenizer, metaspace_tokenizer),
    (metaspace_tokenizer, byte_level_tokenizer),
    (byte_level_tokenizer, lambda: metaspace_tokenizer(prefix_space=True)),
    (lambda: metaspace_tokenizer(prefix_space=True), byte_level_tokenizer),
    (byte_level_tokenizer, lambda: byte_level_tokenizer(300)),
]


@pytest.fixture(params=PAIRS, ids=["byte-meta", "meta-byte", "byte-llama", "llama-byte", "byte-byte"])
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    receiver, sharer = request.param
    return receiver(), sharer()


def offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    return tokenizer(text, return_offsets_mapping=True)["offset_mapping"]


def naive_spans(receiver: list, sharer: list, segments: list) -> list[int]:
    result = []
    for start, end in receiver:
        best = -1
        for receiver_start, sharer_start, length in segments:
            if end > start and receiver_start <= end - 1 < receiver_start + length:
                character = end - 1 - receiver_start + sharer_start
                for position, (first, last) in enumerate(sharer):
                    if first <= character < last:
                        best = position
        result.append(best)
    return result


def test_spans_equal_a_naive_search(pair: tuple) -> None:
    rng = random.Random(0)
    alphabet = "".join(SAMPLES)
    for _ in range(150):
        pieces = []
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(alphabet))
            pieces.append(alphabet[start : start + rng.randint(0, 20)])
        text = "".join(pieces)
        head = rng.choice(["", "context ", "北京\n\n"])
        segments = [(0, len(head), len(text))]
        if len(text) > 6:
            cut = rng.randint(1, len(text) - 3)
            segments = rng.sample([(0, len(head), cut), (cut + 2, len(head) + cut + 2, len(text) - cut - 2)], 2)
        receiver, sharer = offsets(pair[0], text), offsets(pair[1], head + text)
        assert align_spans(receiver, sharer, segments).tolist() == naive_spans(receiver, sharer, segments)


@pytest.mark.parametrize("text", SAMPLES)
def test_every_aligned_pair_ends_on_the_same_text(pair: tuple, text: str) -> None:
    head = "Some context. "
    receiver, sharer = offsets(pair[0], text), offsets(pair[1], head + text)
    alignment = align_spans(receiver, sharer, [(0, len(head), len(text))])
    assert np.array_equal(alignment >= 0, np.array([end > start for start, end in receiver]))
    assert (np.diff(alignment[alignment >= 0]) >= 0).all()
    for (start, end), position in zip(receiver, alignment, strict=True):
        if end > start:
            first, last = sharer[position]
            assert first <= len(head) + end - 1 < last
            assert text[start:end][-1] in (head + text)[first:last]
            assert position + 1 == len(sharer) or sharer[position + 1][0] >= len(head) + end


def test_spans_of_hand_made_offsets() -> None:
    # A BOS, then "ab" and "c"; a character that no token covers; a token behind the segment.
    receiver = [(0, 0), (0, 1), (0, 2), (2, 3), (3, 4), (4, 6)]
    sharer = [(0, 0), (10, 12), (12, 13), (14, 16)]
    assert align_spans(receiver, sharer, [(0, 10, 4)]).tolist() == [-1, 1, 1, 2, -1, -1]
    assert align_spans(receiver, sharer, []).tolist() == [-1] * 6
    assert align_spans([], sharer, [(0, 10, 4)]).tolist() == []
    assert align_spans(receiver, [], [(0, 10, 4)]).tolist() == [-1] * 6


@pytest.mark.real_pair
def test_spans_of_the_real_pair(real_pair: tuple[str, str]) -> None:
    receiver, sharer = (AutoTokenizer.from_pretrained(folder) for folder in real_pair)
    for item in json.loads(REFERENCE.read_text(encoding="utf-8"))["items"]:
        text = item["prompt"]
        spans, sharer_spans = offsets(receiver, text), offsets(sharer, text)
        alignment = align_spans(spans, sharer_spans, [(0, 0, len(text))])
        assert alignment.tolist() == naive_spans(spans, sharer_spans, [(0, 0, len(text))])
        assert (alignment > 0).all()
