"""The cache: wrapped caches behave as they do alone, fused states stand where they should, reading goes on."""

import pytest
import torch
from conftest import CONFIGS, pad_rows, random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from c2c_hf import C2CCache
from c2c_hf.prefill import RecordingCache, SharerState, cached_states, full_length_cache, read_text


def numbered(start: int, length: int, batch: int = 2, shift: float = 0.0) -> torch.Tensor:
    """States `(batch, 2, length, 8)` whose value says row and position."""
    positions = torch.arange(start, start + length).float().view(1, 1, length, 1)
    return (
        (positions + 100 * torch.arange(batch).view(batch, 1, 1, 1) + shift).expand(batch, 2, length, 8).contiguous()
    )


def caches() -> dict:
    config = CONFIGS["llama"]
    sliding = CONFIGS["mistral"]
    return {
        "dynamic": lambda: DynamicCache(config=config),
        "lazy": DynamicCache,
        "sliding": lambda: DynamicCache(config=sliding),
        "static": lambda: StaticCache(config=config, max_cache_len=16),
    }


@pytest.mark.parametrize("name", caches())
def test_wrapping_changes_nothing(name: str) -> None:
    plain, wrapped = caches()[name](), C2CCache(caches()[name]())
    for start, length in ((0, 7), (7, 1), (8, 3)):
        for layer_idx in range(2):
            states = (numbered(start, length), numbered(start, length, shift=0.5))
            for ours, theirs in zip(wrapped.update(*states, layer_idx), plain.update(*states, layer_idx), strict=True):
                assert torch.equal(ours, theirs)
        assert int(wrapped.get_seq_length()) == int(plain.get_seq_length()) == start + length
        assert wrapped.get_mask_sizes(2, 0) == plain.get_mask_sizes(2, 0)
        assert wrapped.is_sliding == plain.is_sliding
        assert wrapped.is_compileable == plain.is_compileable
    assert wrapped.layers is wrapped.receiver_cache.layers


def test_substitution_stays_where_it_is_marked() -> None:
    cache = C2CCache()
    cache.update(numbered(0, 3), numbered(0, 3), 0)
    fused = [(numbered(3, 2, shift=0.25), numbered(3, 2, shift=0.75))]
    marked = torch.tensor([[True, False], [False, True]])
    with cache.substituting(fused, marked):
        keys, values = cache.update(numbered(3, 2), numbered(3, 2), 0)
    cache.update(numbered(5, 1), numbered(5, 1), 0)
    expected = numbered(0, 5)
    expected[0, :, 3] += 0.25
    expected[1, :, 4] += 0.25
    assert torch.equal(keys, expected)
    assert torch.equal(values[0, 0, :, 0], torch.tensor([0, 1, 2, 3.75, 4]))
    assert torch.equal(cache.layers[0].keys[:, :, 5:], numbered(5, 1))


def filled() -> C2CCache:
    """Two rows: a fused cache, clean states and a sharer's state, all of six positions."""
    cache = C2CCache()
    cache.update(numbered(0, 6), numbered(0, 6), 0)
    cache.keep_clean().update(numbered(0, 6, shift=0.5), numbered(0, 6), 0)
    shared = full_length_cache()
    shared.update(numbered(0, 6, shift=0.25), numbered(0, 6), 0)
    ids = torch.arange(12).view(2, 6)
    cache.sharer_states = [SharerState(ids, torch.ones_like(ids), shared), None]
    return cache


def rows_of(cache: C2CCache) -> list[list[int]]:
    """Which row each part's rows were at first."""
    state = cache.sharer_states[0]
    parts = (cache.layers[0].keys, cache.clean_cache.layers[0].keys, state.cache.layers[0].keys)
    found = [(part[:, 0, 0, 0] // 100).long().tolist() for part in parts]
    return [*found, (state.input_ids[:, 0] // 6).tolist()]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True])), [1]),
    ],
    ids=["reorder", "repeat", "select", "select-mask"],
)
def test_rows_move_together(change, expected: list[int]) -> None:
    cache = filled()
    change(cache)
    assert rows_of(cache) == [expected] * 4


def test_crop_and_reset() -> None:
    cache = filled()
    cache.crop(-2)
    state = cache.sharer_states[0]
    lengths = (cache.get_seq_length(), cache.clean_cache.get_seq_length(), state.cache.get_seq_length())
    assert lengths == (4, 4, 4)
    assert state.input_ids.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    cache.crop(0)
    assert cache.get_seq_length() == 4
    without_streams = filled()
    without_streams.clean_cache = None
    without_streams.crop(-2)
    assert without_streams.sharer_states[0].input_ids.shape == (2, 6), "a sharer's text is not the receiver's tokens"
    plain = DynamicCache()
    plain.update(numbered(0, 4), numbered(0, 4), 0)
    for each in (cache, plain):
        each.reset()
    assert cache.get_seq_length() == plain.get_seq_length()
    assert cache.sharer_states == []
    assert cache.clean_cache is None


@pytest.mark.parametrize("name", caches())
def test_recording_leaves_the_cache_as_it_is(name: str) -> None:
    cache, twin = caches()[name](), caches()[name]()
    for each in (cache, twin):
        for layer_idx in range(2):
            each.update(numbered(0, 7), numbered(0, 7), layer_idx)
    recording = RecordingCache(cache)
    new = numbered(7, 2)
    for layer_idx in range(2):
        ours = recording.update(new, new, layer_idx)
        theirs = twin.update(new, new, layer_idx)
        assert torch.equal(ours[0], theirs[0])
    assert [states[0].shape[2] for states in recording.recorded] == [2, 2]
    assert int(cache.get_seq_length()) == 7
    again = [cache.update(new, new, layer_idx)[0] for layer_idx in range(2)]
    for layer_idx, states in enumerate(again):
        assert states.shape == theirs[0].shape
        assert torch.equal(states, theirs[0]), layer_idx


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
def test_reading_on_equals_reading_at_once(name: str) -> None:
    """Also where a sliding window is shorter than what was read before, and behind padding."""
    model = tiny_model(name)
    rows = [random_ids(14, seed=1), random_ids(9, seed=2)]
    ids, mask = pad_rows(rows, "left"), pad_rows([torch.ones_like(row) for row in rows], "left")
    whole = read_text(model, ids, mask)
    start = read_text(model, ids[:, :8], mask[:, :8])
    grown = read_text(model, ids, mask, known=start)
    assert grown is start
    changed = ids.clone()
    changed[0, 10:] = ids[0, 10:].flip(0)
    again = read_text(model, ids, mask, known=read_text(model, changed, mask))
    real = mask.bool()[:, None, :, None]
    for state in (grown, again):
        assert torch.equal(state.input_ids, ids)
        pairs = zip(cached_states(state.cache), cached_states(whole.cache), strict=True)
        for (keys, values), (all_keys, all_values) in pairs:
            torch.testing.assert_close(keys * real, all_keys * real, atol=1e-5, rtol=0)
            torch.testing.assert_close(values * real, all_values * real, atol=1e-5, rtol=0)


def test_common_prefix() -> None:
    ids = torch.tensor([[0, 5, 6, 7], [4, 5, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    state = SharerState(ids, mask, full_length_cache())
    assert (
        state.common_prefix(torch.tensor([[9, 5, 6, 7, 8], [4, 5, 6, 7, 8]]), torch.cat([mask, mask[:, -1:]], 1)) == 4
    )
    assert state.common_prefix(torch.tensor([[9, 5, 6, 3], [4, 5, 6, 7]]), mask) == 3
    assert state.common_prefix(ids, torch.ones_like(mask)) == 0
    assert state.common_prefix(ids[:1], mask[:1]) == 0
