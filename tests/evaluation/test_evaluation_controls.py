"""Controls: each changes what it says and nothing else."""

import pytest
import torch
from evaluation_for_tests import CHOICES, PROMPTS, pair

from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.evaluation.answering import Inputs, Query
from c2c_hf.evaluation.controls import CONTROLS as CHANGES
from c2c_hf.evaluation.controls import Control, Noise, Zero
from c2c_hf.evaluation.fused_answering import C2CAnswerer
from c2c_hf.evaluation.payload import PAYLOADS, Part, Rounded
from c2c_hf.inference.prefill import full_length_cache, read_text

CONTROLS = {**CHANGES, **PAYLOADS}
DONORS = [*PROMPTS[1:], PROMPTS[0]]
QUERIES = [
    Query(prompt, seed=7 + i, donor=donor) for i, (prompt, donor) in enumerate(zip(PROMPTS, DONORS, strict=True))
]


def inputs_under(name: str, sharers: int = 2) -> tuple[Inputs, Inputs]:
    model, processor = pair(sharers)
    right = C2CAnswerer(model, processor)._inputs(QUERIES, strip=True)
    return right, C2CAnswerer(model, processor, CONTROLS[name])._inputs(QUERIES, strip=True)


def logprobs(control: Control | None = None, queries: list[Query] = QUERIES) -> list[float]:
    model, processor = pair(sharers=2)
    answerer = C2CAnswerer(model, processor, control or Control())
    return [score.logprob for row in answerer.score(queries, CHOICES[: len(queries)]) for score in row]


@pytest.mark.parametrize("name", CONTROLS)
def test_batches_equal_single_queries(name: str) -> None:
    """Chance draws are each item's own."""
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


def test_gates_off_is_alone_and_gives_the_gates_back() -> None:
    torch.testing.assert_close(logprobs(CONTROLS["gates_off"]), logprobs(CONTROLS["alone"]), atol=1e-4, rtol=0)
    model, processor = pair()
    before = {name: p.clone() for name, p in model.named_parameters() if "gate_logit" in name}
    with pytest.raises(ValueError, match="at least one token"), CONTROLS["gates_off"].around(model):
        assert all((p == -1).all() for name, p in model.named_parameters() if "gate_logit" in name)
        C2CAnswerer(model, processor).score(QUERIES[:1], [[""]])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if "gate_logit" in name)


def test_mismatched_reads_the_donor() -> None:
    right, wrong = inputs_under("mismatched")
    model, processor = pair(sharers=2)
    donors = processor(DONORS)
    assert torch.equal(right["input_ids"], wrong["input_ids"])
    for index in range(2):
        assert torch.equal(wrong["sharer_input_ids"][index], donors["sharer_input_ids"][index])
        before, after = right["sharer_alignment"][index], wrong["sharer_alignment"][index]
        mask = donors["sharer_attention_mask"][index]
        assert torch.equal(before >= 0, after >= 0), "the same positions read"
        for row in range(len(PROMPTS)):
            read = after[row][after[row] >= 0]
            assert mask[row, read].all(), "no position reads padding"
            assert (read.diff() >= 0).all()
    # With the question itself for a donor nothing changes.
    own = [Query(prompt, donor=prompt) for prompt in PROMPTS]
    same = C2CAnswerer(model, processor, CONTROLS["mismatched"])._inputs(own, strip=True)
    assert all(torch.equal(a, b) for a, b in zip(same["sharer_alignment"], right["sharer_alignment"], strict=True))


def test_mismatched_needs_a_donor() -> None:
    with pytest.raises(ValueError, match="another question's prompt"):
        logprobs(CONTROLS["mismatched"], [Query(PROMPTS[0])])


def test_shuffled_is_a_permutation_of_what_is_read() -> None:
    right, shuffled = inputs_under("shuffled")
    for before, after in zip(right["sharer_alignment"], shuffled["sharer_alignment"], strict=True):
        assert torch.equal(before >= 0, after >= 0)
        assert torch.equal(before.sort(1).values, after.sort(1).values)
        assert not torch.equal(before, after)


def test_noise_keeps_norms_and_zero_does_not() -> None:
    model, processor = pair()
    inputs = processor(PROMPTS)
    states = [read_text(model.sharers[0], inputs["sharer_input_ids"], inputs["sharer_attention_mask"]) for _ in "abc"]
    real = inputs["sharer_attention_mask"].bool()
    Noise().change_state(states[1], [1, 2, 3, 4])
    Zero().change_state(states[2], [1, 2, 3, 4])
    for own, noise, zero in zip(*(state.entries() for state in states), strict=True):
        assert not zero.any()
        own, noise = own.transpose(1, 2)[real], noise.transpose(1, 2)[real]
        torch.testing.assert_close(noise.norm(dim=-1), own.norm(dim=-1))
        assert torch.nn.functional.cosine_similarity(noise, own, dim=-1).abs().mean() < 0.5


def test_parts_are_those_positions() -> None:
    model, processor = pair()
    right = C2CAnswerer(model, processor)._inputs(QUERIES, strip=True)["sharer_alignment"][0]
    chosen = {}
    for which in ("first", "last", "top"):
        inputs = C2CAnswerer(model, processor, Part(which, 0.5))._inputs(QUERIES, strip=True)
        chosen[which] = inputs["sharer_alignment"][0]
        kept = chosen[which] >= 0
        assert torch.equal(chosen[which][kept], right[kept])
        assert kept.sum(1).tolist() == [max(1, round(0.5 * int(n))) for n in (right >= 0).sum(1)]
    for row, read in enumerate(right >= 0):
        columns = read.nonzero().flatten().tolist()
        half = max(1, round(0.5 * len(columns)))
        assert (chosen["first"][row] >= 0).nonzero().flatten().tolist() == columns[:half]
        assert (chosen["last"][row] >= 0).nonzero().flatten().tolist() == columns[len(columns) - half :]
    everything = C2CAnswerer(model, processor, Part("top", 1.0))._inputs(QUERIES, strip=True)
    assert torch.equal(everything["sharer_alignment"][0], right)


def test_top_positions_change_most() -> None:
    """Worked out one position at a time: the change of a position's values does not depend on the others'."""
    model, processor = pair()
    inputs = C2CAnswerer(model, processor)._inputs(QUERIES[:1], strip=True)
    columns = (inputs["sharer_alignment"][0][0] >= 0).nonzero().flatten().tolist()

    def values(alignment: torch.Tensor) -> torch.Tensor:
        cache = full_length_cache()
        with torch.no_grad():
            model(**{**inputs, "sharer_alignment": [alignment], CACHE_ARGUMENT: cache}, logits_to_keep=1)
        return torch.stack([layer.values for layer in cache.layers])

    nothing = torch.full_like(inputs["sharer_alignment"][0], -1)
    clean, norms = values(nothing), []
    for column in columns:
        one = nothing.clone()
        one[0, column] = inputs["sharer_alignment"][0][0, column]
        norms.append(float((values(one) - clean)[:, 0, :, column].square().sum()))
    half = max(1, round(0.5 * len(columns)))
    expected = {columns[i] for i in sorted(range(len(columns)), key=norms.__getitem__)[-half:]}
    chosen = C2CAnswerer(model, processor, Part("top", 0.5))._inputs(QUERIES[:1], strip=True)
    assert set((chosen["sharer_alignment"][0][0] >= 0).nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded(bits: int) -> None:
    model, processor = pair()
    inputs = C2CAnswerer(model, processor)._inputs(QUERIES, strip=True)
    read = (model.sharers[0], inputs["sharer_input_ids"][0], inputs["sharer_attention_mask"][0])
    exact, rounded = read_text(*read), read_text(*read)
    Rounded(bits).change_state(rounded, [0] * len(QUERIES))
    for before, after in zip(exact.entries(), rounded.entries(), strict=True):
        largest = before.abs().amax(-1, keepdim=True)
        assert ((after - before).abs() <= largest / (2**bits - 2) + 1e-6).all() and not torch.equal(before, after)
        assert len((after / largest.clamp_min(1e-9)).unique()) > 2
