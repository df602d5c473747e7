"""Token tables, vocabularies and the choice of an alignment."""

import re
from collections.abc import Callable

import pytest
import torch
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf.alignment.token_table import (
    apply_token_table,
    build_token_table,
    own_bos_token_id,
    resolve_alignments,
    same_vocabulary,
)


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
    with pytest.raises(ValueError, match=r"`strategy` must be one of \['first', 'longest'\], but got 'shortest'"):
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
        bos = [bos_token_id] if bos_token_id and row and mapped[0] != bos_token_id else []
        assert sharer_ids[i][sharer_mask[i].bool()].tolist() == bos + kept
        assert (sharer_ids[i][sharer_mask[i] == 0] == 0).all()
        positions = alignment[i][mask[i].bool()]
        assert [int(sharer_ids[i, p]) if p >= 0 else -1 for p in positions] == mapped
        assert (alignment[i][mask[i] == 0] == -1).all()
        if bos:
            # Right before the row's first real token.
            first = int(mask[i].argmax())
            assert sharer_mask[i, first] == 1 and sharer_ids[i, first] == bos_token_id


def test_applied_table_takes_no_columns() -> None:
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert [x.shape for x in apply_token_table(TABLE, empty, empty, 7)] == [(2, 0)] * 3


def test_applied_table_never_looks_at_values_on_the_host() -> None:
    # Meta tensors have no values: whatever would synchronise with a GPU fails on them.
    ids = torch.zeros(2, 3, dtype=torch.long, device="meta")
    sharer_ids, sharer_mask, alignment = apply_token_table(TABLE.to("meta"), ids, ids, 7)
    assert sharer_ids.shape == sharer_mask.shape == (2, 4)
    assert alignment.shape == (2, 3)


@pytest.mark.parametrize("bos_token_id", [None, 7])
def test_applied_table_launches_no_host_synchronisation(bos_token_id: int | None) -> None:
    ids = torch.tensor([[0, 3, 2, 4], [1, 3, 4, 0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])

    def launched(work: Callable[[], object]) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            work()
        return {event.key for event in profile.key_averages()}

    # Operators that copy a value to the host, or make a shape depend on one.
    synchronizing = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
    synchronizing |= {"aten::masked_select", "aten::unique_consecutive", "aten::_unique2"}
    assert {"aten::item", "aten::_local_scalar_dense"} <= launched(lambda: bool(ids.any()))
    applied = launched(lambda: apply_token_table(TABLE, ids, mask, bos_token_id))
    assert "aten::index" in applied and not applied & synchronizing


def test_own_bos_and_same_vocabulary() -> None:
    byte_level, metaspace = byte_level_tokenizer(), metaspace_tokenizer()
    assert own_bos_token_id(metaspace) == metaspace.bos_token_id
    byte_level.bos_token = "<|im_start|>"
    assert own_bos_token_id(byte_level) is None
    assert same_vocabulary(byte_level, byte_level_tokenizer())
    assert not same_vocabulary(byte_level, metaspace)
    # A newer release may add tokens, but one id must not stand for two.
    newer, other = byte_level_tokenizer(), byte_level_tokenizer()
    newer.add_tokens(["<think>"])
    assert same_vocabulary(newer, other) and same_vocabulary(other, newer)
    other.add_tokens(["<tool>"])
    assert not same_vocabulary(newer, other)
    assert not same_vocabulary(byte_level, byte_level_tokenizer(300))


def test_resolved_alignments() -> None:
    receiver, same, other = byte_level_tokenizer(), byte_level_tokenizer(), metaspace_tokenizer()
    assert resolve_alignments(None, [receiver, same, other]) == ["identity", "span"]
    assert resolve_alignments("longest", [receiver, same, other]) == ["longest", "longest"]
    assert resolve_alignments(["identity", None], [receiver, same, same]) == ["identity", "identity"]
    with pytest.raises(ValueError, match="`token_alignment` must be one value, or one per sharer"):
        resolve_alignments(["span"], [receiver, same, other])
    with pytest.raises(ValueError, match="`token_alignment` must be one of .* got 'near'"):
        resolve_alignments("near", [receiver, same])
    with pytest.raises(ValueError, match="same vocabulary, but those of the receiver .* and of sharer 1 .* differ"):
        resolve_alignments("identity", [receiver, same, other])


def test_resolved_alignments_of_models() -> None:
    receiver, sharer = byte_level_tokenizer(), byte_level_tokenizer()
    # Embeddings are often padded, which is no difference.
    assert resolve_alignments(None, [receiver, sharer], [len(receiver), len(sharer) + 64]) == ["identity"]
    # The receiver's added token has an embedding in the sharer or not.
    receiver.add_tokens(["<think>"])
    assert resolve_alignments(None, [receiver, sharer], [len(receiver), len(sharer) + 64]) == ["identity"]
    assert resolve_alignments(None, [receiver, sharer], [len(receiver), len(sharer)]) == ["span"]
    # Without tokenizers the sizes decide.
    assert resolve_alignments(None, [None, None, sharer], [96, 96, 97]) == ["identity", "span"]
    with pytest.raises(
        ValueError, match="`token_alignment='identity'` needs receiver and sharer .*96 tokens.*97 tokens"
    ):
        resolve_alignments("identity", [None, None], [96, 97])
    with pytest.raises(ValueError, match="`vocab_sizes` must be given where a tokenizer is None"):
        resolve_alignments(None, [receiver, None])
