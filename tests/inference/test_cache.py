"""The cache: wrapped caches behave as by themselves, fused states take their places, sharers' caches are continued."""

import copy
import importlib.util

import pytest
import torch
from conftest import CONFIGS, pad_rows, random_ids, tiny_c2c, tiny_model
from transformers import DynamicCache, QuantizedCache, StaticCache

from c2c_hf import C2CCache
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.inference.cache import RecordingCache
from c2c_hf.inference.prefill import cached_states, full_length_cache
from c2c_hf.inference.sharer_cache import SharerCache, prefill_sharer


def numbered(start: int, length: int, batch: int = 2, shift: float = 0.0) -> torch.Tensor:
    """States `(batch, 2, length, 8)` whose value says row and position."""
    positions = torch.arange(start, start + length).float().view(1, 1, length, 1)
    return (
        (positions + 100 * torch.arange(batch).view(batch, 1, 1, 1) + shift).expand(batch, 2, length, 8).contiguous()
    )


def caches() -> dict:
    config = CONFIGS["llama"]
    sliding = CONFIGS["mistral"]

    def quantized() -> QuantizedCache:
        if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.quanto") is None:
            pytest.skip("transformers' quantized cache needs optimum-quanto (extra `[test]`)")
        # After every fourth token the states are quantized.
        return QuantizedCache(backend="quanto", config=config, nbits=4, q_group_size=8, residual_length=4)

    return {
        "dynamic": lambda: DynamicCache(config=config),
        "lazy": DynamicCache,
        "sliding": lambda: DynamicCache(config=sliding),
        "static": lambda: StaticCache(config=config, max_cache_len=16),
        "static-sliding": lambda: StaticCache(config=sliding, max_cache_len=16),
        "quantized": quantized,
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
    with cache.replacing_states(fused, marked):
        keys, values = cache.update(numbered(3, 2), numbered(3, 2), 0)
    cache.update(numbered(5, 1), numbered(5, 1), 0)
    expected = numbered(0, 5)
    expected[0, :, 3] += 0.25
    expected[1, :, 4] += 0.25
    assert torch.equal(keys, expected)
    assert torch.equal(values[0, 0, :, 0], torch.tensor([0, 1, 2, 3.75, 4]))
    assert torch.equal(cache.layers[0].keys[:, :, 5:], numbered(5, 1))


@pytest.mark.parametrize("name", caches())
def test_substituted_states_enter_through_the_wrapped_cache(name: str) -> None:
    """Longer than the sliding window and than what a quantized cache keeps unquantized."""
    plain, wrapped = caches()[name](), C2CCache(caches()[name]())
    generator = torch.Generator().manual_seed(0)
    for start, length in ((0, 7), (7, 1), (8, 4)):
        marked = torch.rand(2, length, generator=generator) < 0.5
        own = [(numbered(start, length, shift=0.1 * i), numbered(start, length, shift=-0.1 * i)) for i in range(2)]
        fused = [(numbered(start, length, shift=40 + i), numbered(start, length, shift=50 + i)) for i in range(2)]
        with wrapped.replacing_states(fused, marked):
            ours = [wrapped.update(*states, layer_idx) for layer_idx, states in enumerate(own)]
        for layer_idx in range(2):
            where = marked[:, None, :, None]
            pairs = zip(fused[layer_idx], own[layer_idx], strict=True)
            theirs = plain.update(*(torch.where(where, new, old) for new, old in pairs), layer_idx)
            assert torch.equal(ours[layer_idx][0], theirs[0])
            assert torch.equal(ours[layer_idx][1], theirs[1])


def test_substitution_ends_with_its_context() -> None:
    cache = C2CCache()
    fused = [(numbered(0, 2, shift=0.5), numbered(0, 2, shift=0.5))]
    with (
        pytest.raises(RuntimeError, match="within"),
        cache.replacing_states(fused, torch.ones(2, 2, dtype=torch.bool)),
    ):
        raise RuntimeError("within")
    keys, _ = cache.update(numbered(0, 2), numbered(0, 2), 0)
    assert torch.equal(keys, numbered(0, 2))


def filled() -> C2CCache:
    """Two rows: a fused cache, clean states and a sharer's state, all of six positions."""
    cache = C2CCache()
    cache.update(numbered(0, 6), numbered(0, 6), 0)
    cache.keep_unfused().update(numbered(0, 6, shift=0.5), numbered(0, 6), 0)
    shared = full_length_cache()
    shared.update(numbered(0, 6, shift=0.25), numbered(0, 6), 0)
    ids = torch.arange(12).view(2, 6)
    cache.sharer_caches = [SharerCache(ids, torch.ones_like(ids), shared), None]
    return cache


def rows_of(cache: C2CCache) -> list[list[int]]:
    """Which row each part's rows were at first."""
    state = cache.sharer_caches[0]
    parts = (cache.layers[0].keys, cache.unfused_cache.layers[0].keys, state.cache.layers[0].keys)
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
    state = cache.sharer_caches[0]
    lengths = (cache.get_seq_length(), cache.unfused_cache.get_seq_length(), state.cache.get_seq_length())
    assert lengths == (4, 4, 4)
    assert state.input_ids.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    cache.crop(0)
    assert cache.get_seq_length() == 4
    without_streams = filled()
    without_streams.unfused_cache = None
    without_streams.crop(-2)
    assert without_streams.sharer_caches[0].input_ids.shape == (2, 6), "a sharer's text is not the receiver's tokens"
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.sharer_caches == []
    assert cache.unfused_cache is None


def test_a_copy_goes_its_own_way() -> None:
    """As users keep a common beginning: copied with `copy.deepcopy`, continued twice."""
    model, start, end = tiny_c2c(), random_ids(1, 8), random_ids(1, 3, seed=5)
    for cache in (C2CCache(), C2CCache(StaticCache(config=model.receiver.config, max_cache_len=16))):
        with torch.no_grad():
            model(input_ids=start, cache=cache)
            copied = copy.deepcopy(cache)
            first, read = model(input_ids=end, cache=cache).logits, cache.sharer_caches[0].cache
            assert int(copied.get_seq_length()) == 8
            assert copied.layers is copied.receiver_cache.layers
            assert torch.equal(model(input_ids=end, cache=copied).logits, first)
        assert copied.sharer_caches[0].cache is not read


def test_a_cache_is_used_again_after_reset() -> None:
    model, ids = tiny_c2c(), random_ids(1, 8)
    cache = C2CCache(StaticCache(config=model.receiver.config, max_cache_len=16))
    answers = []
    for _ in range(2):
        answers.append(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, **{CACHE_ARGUMENT: cache}))
        cache.reset()
    assert torch.equal(*answers)


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "in-c2c-cache"])
@pytest.mark.parametrize("name", caches())
def test_recording_leaves_the_cache_as_it_is(name: str, inside: bool) -> None:
    cache, twin = caches()[name](), caches()[name]()
    cache = C2CCache(cache) if inside else cache
    for each in (cache, twin):
        for layer_idx in range(2):
            each.update(numbered(0, 7), numbered(0, 7, shift=0.5), layer_idx)
    new = (numbered(7, 2), numbered(7, 2, shift=0.5))
    # Twice, and on to where sliding windows and quantized states turn over.
    for _ in range(2):
        recording = RecordingCache(cache.receiver_cache if inside else cache)
        # Static layers hand out views of what they overwrite later.
        ours = [[s.clone() for s in recording.update(*new, layer_idx)] for layer_idx in range(2)]
        for start in (9, 11):
            for layer_idx in range(2):
                recording.update(numbered(start, 2), numbered(start, 2), layer_idx)
        assert [states[0].shape[2] for states in recording.recorded] == [2] * 6
        assert torch.equal(recording.recorded[3][1], numbered(9, 2))
        assert int(cache.get_seq_length()) == 7
        assert int(recording.get_seq_length()) == 13
    for layer_idx in range(2):
        theirs, again = twin.update(*new, layer_idx), cache.update(*new, layer_idx)
        for index in (0, 1):
            assert torch.equal(again[index], theirs[index])
            assert torch.equal(ours[layer_idx][index], theirs[index])
    assert int(cache.get_seq_length()) == 9


def test_recorded_states_are_copies() -> None:
    recording, new = RecordingCache(DynamicCache()), numbered(0, 3)
    keys, _ = recording.update(new, new, 0)
    recording.recorded[0][0].zero_()
    assert torch.equal(keys, numbered(0, 3))
    assert torch.equal(new, numbered(0, 3))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
def test_reading_on_equals_reading_at_once(name: str) -> None:
    """Also where a sliding window is shorter than what was read before, and behind padding."""
    model = tiny_model(name)
    rows = [random_ids(14, seed=1), random_ids(9, seed=2)]
    ids, mask = pad_rows(rows, "left"), pad_rows([torch.ones_like(row) for row in rows], "left")
    whole = prefill_sharer(model, ids, mask)
    start = prefill_sharer(model, ids[:, :8], mask[:, :8])
    grown = prefill_sharer(model, ids, mask, cached=start)
    assert grown is start
    changed = ids.clone()
    changed[0, 10:] = ids[0, 10:].flip(0)
    again = prefill_sharer(model, ids, mask, cached=prefill_sharer(model, changed, mask))
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
    state = SharerCache(ids, mask, full_length_cache())
    assert (
        state.common_prefix(torch.tensor([[9, 5, 6, 7, 8], [4, 5, 6, 7, 8]]), torch.cat([mask, mask[:, -1:]], 1)) == 4
    )
    assert state.common_prefix(torch.tensor([[9, 5, 6, 3], [4, 5, 6, 7]]), mask) == 3
    assert state.common_prefix(ids, torch.ones_like(mask)) == 0
    assert state.common_prefix(ids[:1], mask[:1]) == 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_reading_less_than_was_read(name: str) -> None:
    model, ids = tiny_model(name), random_ids(2, 14)
    mask = torch.ones_like(ids)
    longer = prefill_sharer(model, ids, mask)
    shorter = prefill_sharer(model, ids[:, :9], mask[:, :9], cached=longer)
    assert shorter is longer
    assert shorter.input_ids.shape == (2, 9)
    expected = prefill_sharer(model, ids[:, :9], mask[:, :9])
    for pair, expected_pair in zip(cached_states(shorter.cache), cached_states(expected.cache), strict=True):
        for states, expected_states in zip(pair, expected_pair, strict=True):
            torch.testing.assert_close(states, expected_states, atol=1e-5, rtol=0)
    fewer_rows = prefill_sharer(model, ids[:1], mask[:1], cached=shorter)
    assert fewer_rows is not shorter
    assert fewer_rows.cache.get_seq_length() == 14


def test_state_of_a_sharer() -> None:
    """Rows and positions are kept in the same way for tokens, mask and states."""
    cache = full_length_cache()
    for layer_idx in range(2):
        cache.update(numbered(0, 6), numbered(0, 6, shift=0.5), layer_idx)
    ids = torch.arange(12).view(2, 6)
    state = SharerCache(ids, ids % 5, cache)
    assert [entry[0, 0, 1, 0].item() for entry in state.entries()] == [1.0, 1.0, 1.5, 1.5]
    state.crop(6)
    assert state.cache.get_seq_length() == 6
    state.crop(4)
    state.select_rows(torch.tensor([1, 1, 0]))
    assert state.input_ids.tolist() == [[6, 7, 8, 9], [6, 7, 8, 9], [0, 1, 2, 3]]
    assert torch.equal(state.attention_mask, state.input_ids % 5)
    for entry in state.entries():
        assert entry[:, 1, :, 3].floor().tolist() == [[100, 101, 102, 103], [100, 101, 102, 103], [0, 1, 2, 3]]
