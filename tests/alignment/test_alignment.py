"""Token tables and spans: which receiver token reads which sharer token."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from c2c_hf.alignment.token_table import (
    align_spans,
    apply_token_table,
    build_token_table,
    mask_last_position,
    own_bos_token_id,
    same_vocabulary,
)

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
    read = align_spans(receiver, sharer, [(0, len(head), len(text))])
    assert np.array_equal(read >= 0, np.array([end > start for start, end in receiver]))
    assert (np.diff(read[read >= 0]) >= 0).all()
    for (start, end), position in zip(receiver, read, strict=True):
        if end > start:
            first, last = sharer[position]
            assert first <= len(head) + end - 1 < last
            assert text[start:end][-1] in (head + text)[first:last]
            assert position + 1 == len(sharer) or sharer[position + 1][0] >= len(head) + end


def test_spans_of_hand_made_offsets() -> None:
    # A BOS, then "ab" and "c"; a character nobody covers; a token behind the segment.
    receiver = [(0, 0), (0, 1), (0, 2), (2, 3), (3, 4), (4, 6)]
    sharer = [(0, 0), (10, 12), (12, 13), (14, 16)]
    assert align_spans(receiver, sharer, [(0, 10, 4)]).tolist() == [-1, 1, 1, 2, -1, -1]
    assert align_spans(receiver, sharer, []).tolist() == [-1] * 6
    assert align_spans([], sharer, [(0, 10, 4)]).tolist() == []
    assert align_spans(receiver, [], [(0, 10, 4)]).tolist() == [-1] * 6


# ---------------------------------------------------------------------- tables


def test_table_equals_one_token_at_a_time() -> None:
    receiver, sharer = byte_level_tokenizer(), metaspace_tokenizer()
    first, longest = (build_token_table(receiver, sharer, s) for s in ("first", "longest"))
    quirks = build_token_table(receiver, sharer, "longest", "unk", "replace")
    several = 0
    for token, i in receiver.get_vocab().items():
        text = receiver.decode([i], clean_up_tokenization_spaces=False)
        pieces = sharer(text, add_special_tokens=False)["input_ids"]
        if i in (0, 1, 2):
            continue
        partial = "\ufffd" in text
        assert first[i] == (-1 if partial else pieces[0]), token
        best = max(pieces, key=lambda p: len(sharer.decode([p], clean_up_tokenization_spaces=False)))
        assert longest[i] == (-1 if partial else best), token
        assert quirks[i] == best
        several += len(pieces) > 1
    assert several > 20


def test_table_gives_a_word_its_own_text_whatever_the_prefix_space() -> None:
    for receiver, sharer in (
        (byte_level_tokenizer(), metaspace_tokenizer(prefix_space=True)),
        (metaspace_tokenizer(prefix_space=True), byte_level_tokenizer()),
        (metaspace_tokenizer(prefix_space=True), metaspace_tokenizer(700, prefix_space=True)),
    ):
        table = build_token_table(receiver, sharer)
        common = 0
        for token, i in receiver.get_vocab().items():
            if re.fullmatch("[▁Ġ]?[a-z]+", token):
                piece = sharer.convert_ids_to_tokens(int(table[i])).replace("Ġ", "▁")
                # Never a space that is not there, and never a space twice. A lone letter may fall back to its byte.
                assert token.replace("Ġ", "▁").startswith(piece) or piece == f"<0x{ord(token[0]):02X}>", (token, piece)
                common += token.replace("Ġ", "▁") == piece
        assert common > 50


def test_table_special_tokens_by_role_then_by_name() -> None:
    receiver, sharer = byte_level_tokenizer(), metaspace_tokenizer()
    table = build_token_table(receiver, sharer)
    # The end token is pad as well: `eos` is filled in after `pad`.
    assert table[[0, 2]].tolist() == [sharer.unk_token_id, sharer.eos_token_id]
    assert table[1] == -1
    assert build_token_table(receiver, sharer, unknown="unk")[1] == sharer.unk_token_id
    sharer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    assert build_token_table(receiver, sharer)[1] == sharer.convert_tokens_to_ids("<|im_start|>")


def test_table_skips_parts_of_characters_and_keeps_the_replacement_character() -> None:
    receiver, sharer = byte_level_tokenizer(), metaspace_tokenizer()
    receiver.add_tokens(["\ufffd"])
    table = build_token_table(receiver, sharer, vocab_size=1000)
    assert len(table) == 1000
    assert (table[len(receiver) :] == -1).all()
    assert table[receiver.convert_tokens_to_ids("\ufffd")] >= 0
    assert table[receiver("龘")["input_ids"]].tolist() == [-1, -1, -1]
    assert (build_token_table(receiver, sharer, partial_characters="replace")[receiver("龘")["input_ids"]] >= 0).all()
    llama = metaspace_tokenizer(prefix_space=True)
    assert build_token_table(llama, receiver)[llama.convert_tokens_to_ids("<0xE9>")] == -1


def test_table_errors() -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(ValueError, match="`strategy` must be one of 'first', 'longest', got 'shortest'"):
        build_token_table(tokenizer, tokenizer, "shortest")
    with pytest.raises(ValueError, match="`unknown` must be"):
        build_token_table(tokenizer, tokenizer, unknown="bos")


TABLE = torch.tensor([9, 7, -1, 5, 6])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos_token_id", [None, 7])
def test_applied_table_equals_a_loop(side: str, bos_token_id: int | None) -> None:
    rows = [[3, 2, 4], [1, 3, 4, 0, 2], [2, 1], [8, -1, 3], [], [4]]
    width = 6
    padding = [[0] * (width - len(row)) for row in rows]
    ids = torch.tensor([p + r if side == "left" else r + p for r, p in zip(rows, padding, strict=True)])
    mask = torch.tensor(
        [
            [0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
            for r, p in zip(rows, padding, strict=True)
        ]
    )
    sharer_ids, sharer_mask, alignment = apply_token_table(TABLE, ids, mask, bos_token_id)
    assert sharer_ids.dtype == sharer_mask.dtype == alignment.dtype == torch.int64
    assert sharer_ids.shape == sharer_mask.shape == (len(rows), width + (bos_token_id is not None))
    assert alignment.shape == ids.shape
    for i, row in enumerate(rows):
        mapped = [int(TABLE[t]) if 0 <= t < 5 else -1 for t in row]
        kept = [m for m in mapped if m >= 0]
        start = [bos_token_id] if bos_token_id and row and mapped[0] != bos_token_id else []
        assert sharer_ids[i][sharer_mask[i].bool()].tolist() == start + kept
        assert (sharer_ids[i][sharer_mask[i] == 0] == 0).all()
        read = alignment[i][mask[i].bool()]
        assert [int(sharer_ids[i, p]) if p >= 0 else -1 for p in read] == mapped
        assert (alignment[i][mask[i] == 0] == -1).all()
        if start:
            # The start stands right before the row's first real token.
            first = int(mask[i].argmax())
            assert sharer_mask[i, first] == 1 and sharer_ids[i, first] == bos_token_id


def test_applied_table_takes_no_columns() -> None:
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert [x.shape for x in apply_token_table(TABLE, empty, empty, 7)] == [(2, 0)] * 3
    assert mask_last_position(empty, empty).shape == (2, 0)


def test_applied_table_never_looks_at_values_on_the_host() -> None:
    # Meta tensors have no values: whatever would synchronise with a GPU fails on them.
    ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
    sharer_ids, _, alignment = apply_token_table(TABLE.to("meta"), ids, ids, 7)
    assert sharer_ids.shape == (2, 4)
    assert mask_last_position(alignment, ids).shape == (2, 3)


@pytest.mark.parametrize("bos_token_id", [None, 7])
def test_applied_table_launches_no_host_synchronisation(bos_token_id: int | None) -> None:
    ids = torch.tensor([[0, 3, 2, 4], [1, 3, 4, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])

    def launched(work: Callable[[], object]) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work()
        return {event.key for event in profile.key_averages()}

    # What reads a value on the host, or makes a shape depend on one.
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
    waiting |= {"aten::masked_select", "aten::unique_consecutive", "aten::_unique2"}
    assert {"aten::item", "aten::_local_scalar_dense"} <= launched(lambda: bool(ids.any()))
    applied = launched(lambda: apply_token_table(TABLE, ids, mask, bos_token_id))
    assert "aten::index" in applied and not applied & waiting
    masked = launched(lambda: mask_last_position(ids, mask))
    assert "aten::scatter" in masked and not masked & waiting


def test_mask_last_position() -> None:
    alignment = torch.arange(4).repeat(3, 1)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert mask_last_position(alignment, mask).tolist() == [[0, 1, 2, -1], [0, -1, 2, 3], [0, 1, 2, -1]]


def test_own_bos_and_same_vocabulary() -> None:
    byte_level, metaspace = byte_level_tokenizer(), metaspace_tokenizer()
    assert own_bos_token_id(metaspace) == metaspace.bos_token_id
    byte_level.bos_token = "<|im_start|>"
    assert own_bos_token_id(byte_level) is None
    assert same_vocabulary(byte_level, byte_level_tokenizer())
    assert not same_vocabulary(byte_level, metaspace)
    # A newer release may add tokens, but not give an id a second meaning.
    newer, other = byte_level_tokenizer(), byte_level_tokenizer()
    newer.add_tokens(["<think>"])
    assert same_vocabulary(newer, other) and same_vocabulary(other, newer)
    other.add_tokens(["<tool>"])
    assert not same_vocabulary(newer, other)
    assert not same_vocabulary(byte_level, byte_level_tokenizer(300))


@pytest.mark.real_pair
def test_spans_of_the_real_pair(real_pair: tuple[str, str]) -> None:
    receiver, sharer = (AutoTokenizer.from_pretrained(folder) for folder in real_pair)
    for item in json.loads(REFERENCE.read_text(encoding="utf-8"))["items"]:
        text = item["prompt"]
        ours, theirs = offsets(receiver, text), offsets(sharer, text)
        read = align_spans(ours, theirs, [(0, 0, len(text))])
        assert read.tolist() == naive_spans(ours, theirs, [(0, 0, len(text))])
        assert (read > 0).all()
