"""Controls and payload ablations: each changes what it is named after and nothing else."""

import pytest
import torch
from evaluation_for_tests import CHOICES, PROMPTS, pair

from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.evaluation.methods.answerer import PromptBatch, Query
from c2c_hf.evaluation.methods.c2c_answerer import C2CAnswerer
from c2c_hf.evaluation.methods.controls import CONTROLS as PLAIN_CONTROLS
from c2c_hf.evaluation.methods.controls import Control, NoiseStates, ZeroStates
from c2c_hf.evaluation.methods.payload_ablations import PAYLOAD_ABLATIONS, PositionSubset, QuantizedStates
from c2c_hf.inference.prefill import full_length_cache
from c2c_hf.inference.sharer_cache import SharerCache

CONTROLS = {**PLAIN_CONTROLS, **PAYLOAD_ABLATIONS}
MISMATCHED = [*PROMPTS[1:], PROMPTS[0]]
QUERIES = [
    Query(prompt, seed=7 + i, mismatched_prompt=other)
    for i, (prompt, other) in enumerate(zip(PROMPTS, MISMATCHED, strict=True))
]


def batches_under(name: str, sharers: int = 2) -> tuple[PromptBatch, PromptBatch]:
    model, processor = pair(sharers)
    right = C2CAnswerer(model, processor).tokenize(QUERIES, strip=True)
    return right, C2CAnswerer(model, processor, CONTROLS[name]).tokenize(QUERIES, strip=True)


def logprobs(control: Control | None = None, queries: list[Query] = QUERIES) -> list[float]:
    model, processor = pair(sharers=2)
    answerer = C2CAnswerer(model, processor, control or Control())
    return [score.logprob for row in answerer.score(queries, CHOICES[: len(queries)]) for score in row]


@pytest.mark.parametrize("name", CONTROLS)
def test_batches_equal_single_queries(name: str) -> None:
    """Random draws depend on the item, not on its batch."""
    together = logprobs(CONTROLS[name])
    model, processor = pair(sharers=2)
    answerer = C2CAnswerer(model, processor, CONTROLS[name])
    single = [
        score.logprob
        for query, choices in zip(QUERIES, CHOICES, strict=True)
        for score in answerer.score([query], [choices])[0]
    ]
    torch.testing.assert_close(together, single, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in CONTROLS if name != "c2c"])
def test_every_control_differs_from_c2c(name: str) -> None:
    assert max(abs(a - b) for a, b in zip(logprobs(CONTROLS[name]), logprobs(), strict=True)) > 0.01


def test_closed_gates_equal_fusion_off_and_are_restored() -> None:
    torch.testing.assert_close(logprobs(CONTROLS["closed_gates"]), logprobs(CONTROLS["fusion_off"]), atol=1e-4, rtol=0)
    model, processor = pair()
    before = {name: p.clone() for name, p in model.named_parameters() if "gate_logit" in name}
    with pytest.raises(ValueError, match="at least one token"), CONTROLS["closed_gates"].applied(model):
        assert all((p == -1).all() for name, p in model.named_parameters() if "gate_logit" in name)
        C2CAnswerer(model, processor).score(QUERIES[:1], [[""]])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if "gate_logit" in name)


def test_mismatched_prefills_the_other_question() -> None:
    right, wrong = batches_under("mismatched")
    model, processor = pair(sharers=2)
    others = processor(MISMATCHED)
    assert torch.equal(right.input_ids, wrong.input_ids)
    for index in range(2):
        assert torch.equal(wrong.sharer_input_ids[index], others["sharer_input_ids"][index])
        before, after = right.sharer_alignment[index], wrong.sharer_alignment[index]
        mask = others["sharer_attention_mask"][index]
        assert torch.equal(before >= 0, after >= 0), "the same positions are aligned"
        for row in range(len(PROMPTS)):
            aligned = after[row][after[row] >= 0]
            assert mask[row, aligned].all(), "no position is aligned with padding"
            assert (aligned.diff() >= 0).all()
    # With the question itself as the other one nothing changes.
    own = [Query(prompt, mismatched_prompt=prompt) for prompt in PROMPTS]
    same = C2CAnswerer(model, processor, CONTROLS["mismatched"]).tokenize(own, strip=True)
    assert all(torch.equal(a, b) for a, b in zip(same.sharer_alignment, right.sharer_alignment, strict=True))


def test_mismatched_needs_another_question() -> None:
    with pytest.raises(ValueError, match="another question's prompt"):
        logprobs(CONTROLS["mismatched"], [Query(PROMPTS[0])])


def test_shuffled_is_a_permutation_of_the_aligned_positions() -> None:
    right, shuffled = batches_under("shuffled")
    for before, after in zip(right.sharer_alignment, shuffled.sharer_alignment, strict=True):
        assert torch.equal(before >= 0, after >= 0)
        assert torch.equal(before.sort(1).values, after.sort(1).values)
        assert not torch.equal(before, after)


def test_noise_keeps_norms_and_zero_does_not() -> None:
    model, processor = pair()
    inputs = processor(PROMPTS)
    tokens = inputs["sharer_input_ids"], inputs["sharer_attention_mask"]
    caches = [SharerCache.prefill(model.sharers[0], *tokens) for _ in "abc"]
    real = inputs["sharer_attention_mask"].bool()
    NoiseStates().change_states(caches[1], [1, 2, 3, 4])
    ZeroStates().change_states(caches[2], [1, 2, 3, 4])
    for own, noise, zero in zip(*(cache.entries() for cache in caches), strict=True):
        assert not zero.any()
        own, noise = own.transpose(1, 2)[real], noise.transpose(1, 2)[real]
        torch.testing.assert_close(noise.norm(dim=-1), own.norm(dim=-1))
        assert torch.nn.functional.cosine_similarity(noise, own, dim=-1).abs().mean() < 0.5


def test_position_subsets() -> None:
    model, processor = pair()
    right = C2CAnswerer(model, processor).tokenize(QUERIES, strip=True).sharer_alignment[0]
    chosen = {}
    for which in ("first", "last", "most_changed"):
        batch = C2CAnswerer(model, processor, PositionSubset(which, 0.5)).tokenize(QUERIES, strip=True)
        chosen[which] = batch.sharer_alignment[0]
        kept = chosen[which] >= 0
        assert torch.equal(chosen[which][kept], right[kept])
        assert kept.sum(1).tolist() == [max(1, round(0.5 * int(n))) for n in (right >= 0).sum(1)]
    for row, aligned in enumerate(right >= 0):
        columns = aligned.nonzero().flatten().tolist()
        half = max(1, round(0.5 * len(columns)))
        assert (chosen["first"][row] >= 0).nonzero().flatten().tolist() == columns[:half]
        assert (chosen["last"][row] >= 0).nonzero().flatten().tolist() == columns[len(columns) - half :]
    everything = C2CAnswerer(model, processor, PositionSubset("most_changed", 1.0)).tokenize(QUERIES, strip=True)
    assert torch.equal(everything.sharer_alignment[0], right)


def test_most_changed_positions() -> None:
    """Computed one position at a time: the change of a position's values does not depend on the others'."""
    model, processor = pair()
    batch = C2CAnswerer(model, processor).tokenize(QUERIES[:1], strip=True)
    alignment = batch.sharer_alignment[0]
    columns = (alignment[0] >= 0).nonzero().flatten().tolist()

    def values(alignment: torch.Tensor) -> torch.Tensor:
        cache = full_length_cache()
        with torch.no_grad():
            model(**{**batch.fusion_inputs(), "sharer_alignment": [alignment], CACHE_ARGUMENT: cache})
        return torch.stack([layer.values for layer in cache.layers])

    nothing = torch.full_like(alignment, -1)
    clean, norms = values(nothing), []
    for column in columns:
        one = nothing.clone()
        one[0, column] = alignment[0, column]
        norms.append(float((values(one) - clean)[:, 0, :, column].square().sum()))
    half = max(1, round(0.5 * len(columns)))
    expected = {columns[i] for i in sorted(range(len(columns)), key=norms.__getitem__)[-half:]}
    chosen = C2CAnswerer(model, processor, PositionSubset("most_changed", 0.5)).tokenize(QUERIES[:1], strip=True)
    assert set((chosen.sharer_alignment[0][0] >= 0).nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_states(bits: int) -> None:
    model, processor = pair()
    batch = C2CAnswerer(model, processor).tokenize(QUERIES, strip=True)
    tokens = batch.sharer_input_ids[0], batch.sharer_attention_mask[0]
    exact, rounded = (SharerCache.prefill(model.sharers[0], *tokens) for _ in range(2))
    QuantizedStates(bits).change_states(rounded, [0] * len(QUERIES))
    for before, after in zip(exact.entries(), rounded.entries(), strict=True):
        largest = before.abs().amax(-1, keepdim=True)
        assert ((after - before).abs() <= largest / (2**bits - 2) + 1e-6).all() and not torch.equal(before, after)
        assert len((after / largest.clamp_min(1e-9)).unique()) > 2
