"""States that are collected are those that the model computes."""

import pytest
import torch
from conftest import close_gates
from evaluation_for_tests import pair
from fitting_for_tests import memory_pair
from tokenizers_for_tests import TEXT

from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.analysis.states import QUESTION, collect_states, slot_attention
from c2c_hf.inference.prefill import cached_states, full_length_cache

for extra in ("sklearn", "matplotlib"):
    pytest.importorskip(extra, reason="the analysis needs the extra `[analysis]`")


def cached(model, inputs) -> list[torch.Tensor]:
    """Every layer's keys, then values, `(seq_len, width)`, as the receiver attends to them."""
    cache = full_length_cache()
    with torch.no_grad():
        model(**inputs, **{CACHE_ARGUMENT: cache})
    layers = cached_states(cache)
    return [states[0].transpose(0, 1).flatten(1) for kind in zip(*layers, strict=True) for states in kind]


@pytest.mark.parametrize("sharers", [1, 2])
def test_fused_states_are_those_in_the_cache(sharers: int) -> None:
    model, processor = pair(sharers=sharers)
    collected = collect_states(model, processor, TEXT[:2])
    assert len(collected) == sharers
    inputs = processor(TEXT[0])
    fused = cached(model, inputs)
    with model.disable_fusion():
        own = cached(model, inputs)
    alignments = inputs["sharer_alignment"]
    columns = ((alignments[0] if sharers > 1 else alignments)[0] >= 0).nonzero().flatten()
    for states in collected:
        assert sum(states.lengths) == len(states.token_ids) and states.texts == TEXT[:2]
        assert states.lengths[0] == len(columns)
        assert torch.equal(states.token_ids[: len(columns)], inputs["input_ids"][0, columns])
    first = [[entry[: len(columns)] for entry in states.receiver] for states in collected]
    changes = [
        [f[: len(columns)] - r[: len(columns)] for f, r in zip(s.fused, s.receiver, strict=True)] for s in collected
    ]
    for entry, (after, before) in enumerate(zip(fused, own, strict=True)):
        assert torch.allclose(first[0][entry], before[columns], atol=1e-5)
        change = sum(own_change[entry] for own_change in changes)
        assert torch.allclose(change, after[columns] - before[columns], atol=1e-4)
    assert any(entry.abs().max() > 0.1 for entry in changes[0]), "nothing was fused, so nothing was compared"


def test_the_change_is_the_weighted_projection() -> None:
    """With one head per layer its weight is the mean over heads."""
    model, processor = pair(receiver="qwen3")
    (states,) = collect_states(model, processor, TEXT[:1])
    closed = 0
    for entry, projected in enumerate(states.projected):
        change = states.fused[entry] - states.receiver[entry]
        if projected is None:
            closed += 1
            assert states.sharer[entry] is None
            assert not change.any() and not states.weights[entry].any()
        else:
            assert torch.allclose(states.weights[entry][:, None] * projected, change, atol=1e-5)
    assert 0 < closed < len(states.projected)


def test_closed_gates_are_refused() -> None:
    model, processor = pair()
    with pytest.raises(ValueError, match="every gate is closed"):
        collect_states(close_gates(model), processor, TEXT)


@pytest.mark.parametrize("grid", ["receiver", "sharer"])
def test_projected_states_are_the_slots(grid: str) -> None:
    model, processor = pair(mode="memory", memory_grid=grid)
    (several,) = collect_states(model, processor, [TEXT[0], TEXT[4]])
    (states,) = collect_states(model, processor, TEXT[:1])
    (length,) = states.lengths
    assert several.lengths[0] == length and sum(several.lengths) == len(several.token_ids)
    for own, other in zip(states.fused, several.fused, strict=True):
        assert torch.allclose(own, other[:length], atol=1e-4), "a row of a batch is as it is alone"
    assert states.weights is None
    assert all(torch.equal(own, other) for own, other in zip(states.projected, states.fused, strict=True))
    chat = [{"role": "user", "content": "."}]
    inputs = processor.apply_chat_template(chat, sharer_context=TEXT[0])
    slots = inputs["sharer_alignment"][0] >= 0
    if grid == "receiver":
        assert torch.equal(states.token_ids, inputs["input_ids"][0, slots])
        # Values have no position, keys are compared without theirs.
        for slot_states, after in zip(states.fused[3:], cached(model, inputs)[3:], strict=True):
            assert torch.allclose(slot_states, after[slots], atol=1e-4)
        with torch.no_grad():
            own = full_length_cache()
            model.receiver(inputs["input_ids"], **{CACHE_ARGUMENT: own})
        for slot_states, (_, values) in zip(states.receiver[3:], cached_states(own), strict=True):
            assert torch.allclose(slot_states, values[0].transpose(0, 1).flatten(1)[slots], atol=1e-4)


@pytest.mark.parametrize("grid", ["receiver", "sharer"])
def test_slot_attention(grid: str) -> None:
    model, processor = pair(mode="memory", memory_grid=grid)
    before = model.receiver.config._attn_implementation
    attention = slot_attention(model, processor, TEXT[0])
    assert model.receiver.config._attn_implementation == before
    inputs = processor.apply_chat_template([{"role": "user", "content": QUESTION}], sharer_context=TEXT[0])
    num_slots = int((inputs["sharer_alignment"] >= 0).sum())
    assert attention.by_slot.shape == (3, num_slots)
    shares = torch.tensor([attention.slots, attention.sink, attention.prompt])
    assert torch.allclose(shares.sum(0), torch.ones(3), atol=1e-5)
    assert torch.allclose(attention.by_slot.sum(1), shares[0], atol=1e-5)
    if grid == "sharer":
        assert attention.prefilled is None and attention.tokens == []
    else:
        assert all(0 < share < 1 for share in attention.prefilled)
        assert torch.allclose(attention.prefilled_by_slot.sum(1), torch.tensor(attention.prefilled))
        assert len(attention.tokens) == num_slots and "".join(attention.tokens).strip() in TEXT[0]


def test_attention_to_slots_with_the_receivers_own_states() -> None:
    """A fuser of a model onto itself whose map is the identity."""
    model, processor = memory_pair(same=True, memory_token_embeddings=0)
    with torch.no_grad():
        for layer_idx, memory_map in enumerate(model.fuser[0].maps):
            model.fuser[0].source_layers[layer_idx] = [layer_idx]
            memory_map.out_proj.weight.copy_(torch.eye(*memory_map.out_proj.weight.shape))
            memory_map.out_proj.bias.zero_()
    attention = slot_attention(model, processor, TEXT[0])
    # Further layers differ, since the sharer prefills the context without the head of the receiver's chat.
    assert attention.slots[0] == pytest.approx(attention.prefilled[0], abs=1e-5)
