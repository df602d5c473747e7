"""Controls and payload ablations: each changes what it is named after and nothing else."""

import pytest
import torch
from conftest import tiny_model
from evaluation_for_tests import CHOICES, PROMPTS, pair
from naive import feed_forward, hidden_and_weight, read, turned
from tokenizers_for_tests import byte_level_tokenizer
from torch.nn.functional import linear
from transformers import DynamicCache

from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.evaluation.methods.answerer import ModelAnswerer, PromptBatch, Query
from c2c_hf.evaluation.methods.c2c_answerer import C2CAnswerer
from c2c_hf.evaluation.methods.controls import CONTROLS as PLAIN_CONTROLS
from c2c_hf.evaluation.methods.controls import Control, NoiseStates, ZeroStates
from c2c_hf.evaluation.methods.oracle_enrichment import build_oracle
from c2c_hf.evaluation.methods.payload_ablations import PAYLOAD_ABLATIONS, PositionSubset, QuantizedStates
from c2c_hf.evaluation.methods.registry import build_methods, find_control, parse_layers
from c2c_hf.inference.prefill import full_length_cache
from c2c_hf.inference.sharer_cache import SharerCache

NAMES = ["single_layer=1", "layers=0,2", "first=0.3", "last=0.3", "most_changed=0.3"]
#: Those that need a single sharer have a test of their own.
CONTROLS = {
    **{name: control for name, control in PLAIN_CONTROLS.items() if name != "project_only"},
    **PAYLOAD_ABLATIONS,
    **{name: find_control(name) for name in NAMES},
}
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
    batch = C2CAnswerer(model, processor).tokenize(QUERIES, strip=True)
    with pytest.raises(ValueError, match="at least one token"), CONTROLS["closed_gates"].applied(model, batch):
        assert all((p == -1).all() for name, p in model.named_parameters() if "gate_logit" in name)
        C2CAnswerer(model, processor).score(QUERIES[:1], [[""]])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if "gate_logit" in name)


def fused_cache(control: Control) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Keys and values of every layer under a control and without fusion, and which positions are fused."""
    model, processor = pair()
    batch = C2CAnswerer(model, processor).tokenize(QUERIES[:1], strip=True)
    states = []
    for context in (control.applied(model, batch), model.disable_fusion()):
        cache = full_length_cache()
        with torch.no_grad(), context:
            model(**batch.fusion_inputs(), **{CACHE_ARGUMENT: cache})
        states.append([s[0] for layer in cache.layers for s in (layer.keys, layer.values)])
    return *states, batch.sharer_alignment[0][0] >= 0


@pytest.mark.parametrize("name", ["single_layer=1", "layers=0,2"])
def test_layer_subsets(name: str) -> None:
    """The gates of the chosen layers are as learned, all others closed."""
    model, _ = pair()
    entries = len(model.fuser[0].sources)
    is_open = [bool(gate) for gate in _open_gates(model, entries)]
    layers = {"single_layer=1": [1], "layers=0,2": [0, 2]}[name]
    found, clean, fused = fused_cache(find_control(name))
    for index, (states, own) in enumerate(zip(found, clean, strict=True)):
        layer, kind = divmod(index, 2)
        changed = not torch.allclose(states[:, fused], own[:, fused], atol=1e-4)
        # Unfused positions and layers differ by rounding alone: their prefill is another chunk.
        assert changed == (layer in layers and is_open[kind * (entries // 2) + layer])


def _open_gates(model, entries: int) -> torch.Tensor:
    gates = torch.zeros(entries)
    for group in model.fuser[0].groups:
        gates[group.entries] = group.gate.gate_logit.detach()
    return gates > 0


@pytest.mark.parametrize("name", ["all_gates_open", "fuse_only", "project_only"])
@torch.no_grad()
def test_parts_of_the_fuser(name: str) -> None:
    """Entry by entry against the naive projector; afterwards all is as it was."""
    model, processor = pair()
    found, clean, fused = fused_cache(find_control(name))
    batch = C2CAnswerer(model, processor).tokenize(QUERIES[:1], strip=True)
    fuser, alignment = model.fuser[0], batch.sharer_alignment[0][0]
    sharer_states = SharerCache.prefill(model.sharers[0], batch.sharer_input_ids[0]).entries()
    for entry, (source,) in enumerate(fuser.sources):
        group, row = fuser.locate(entry)
        kind, layer = divmod(entry, fuser.num_layers)
        own, changed = clean[2 * layer + kind], found[2 * layer + kind]
        for position in fused.nonzero().flatten().tolist():
            before = own[:, position].flatten()
            shared = sharer_states[source][0, :, alignment[position]].flatten()
            projection, weight = projection_and_weight(fuser, entry, shared, before)
            weighted = (projection.unflatten(0, (len(weight), -1)) * weight[:, None]).flatten()
            expected = {
                "all_gates_open": before + weighted,
                "fuse_only": before + projection,
                "project_only": projection,
            }[name]
            torch.testing.assert_close(changed[:, position].flatten(), expected, atol=1e-4, rtol=1e-4)
        assert bool(_open_gates(model, 2 * fuser.num_layers)[entry]) == bool(group.gate.gate_logit[row] > 0)
    again = C2CAnswerer(model, processor)
    torch.testing.assert_close(
        [score.logprob for score in again.score(QUERIES[:1], CHOICES[:1])[0]],
        [score.logprob for score in C2CAnswerer(*pair()).score(QUERIES[:1], CHOICES[:1])[0]],
    )


def projection_and_weight(fuser, entry: int, shared: torch.Tensor, own: torch.Tensor):
    """Projection and dynamic weights behind an open gate."""
    hidden, _ = hidden_and_weight(fuser, entry, shared, own)
    group, row = fuser.locate(entry)
    part = group.projector
    weight = linear(
        feed_forward(hidden, part.weight_ffn, row), part.weight_proj.weight[row], part.weight_proj.bias[row]
    )
    for block in part.feature_ffns:
        hidden = feed_forward(hidden, block, row)
    return linear(hidden, part.out_proj.weight[row], part.out_proj.bias[row]), weight.sigmoid()


def test_names_with_parameters() -> None:
    assert parse_layers("0,4-6,2") == [0, 4, 5, 6, 2]
    model, processor = pair(sharers=2)
    with pytest.raises(ValueError, match="'project_only' needs a single sharer"):
        build_methods(["project_only"], model, processor)
    assert find_control("receiver") is None and find_control("few_shot=3") is None


EXAMPLES = ["Question: Is it blue?\nAnswer: The sky", "Question: Who?\nAnswer: the keeper", "Question: No?\nAnswer: x"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_oracle_enrichment(name: str) -> None:
    """Against a prefill of examples and question, of whose cache the question's slice is kept by hand."""
    tokenizer = byte_level_tokenizer(chat_template=None)
    receiver = tiny_model(name, 0, len(tokenizer))
    oracle = build_oracle(receiver, tokenizer, 2)
    queries = [Query(prompt, examples=EXAMPLES) for prompt in PROMPTS]
    texts = ["\n\n".join(EXAMPLES[:2]) + "\n\n" + prompt for prompt in PROMPTS]
    plain = ModelAnswerer(receiver, tokenizer)
    scores, unlike = oracle.score(queries, CHOICES), plain.score(queries, CHOICES)
    few_shot = ModelAnswerer(receiver, tokenizer, num_examples=2).score(queries, CHOICES)
    for index, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        ids, long = (torch.tensor(tokenizer(t)["input_ids"]) for t in (prompt, text))
        shift = len(long) - len(ids)
        assert torch.equal(long[shift:], ids)
        whole, kept = DynamicCache(), DynamicCache()
        read(receiver, long[:-1], whole)
        for layer_idx, layer in enumerate(whole.layers):
            keys, values = layer.keys[:, :, shift:], layer.values[:, :, shift:]
            if name == "llama" and keys.shape[2]:
                moved = [turned(receiver, keys[0, :, i], -shift) for i in range(keys.shape[2])]
                keys = torch.stack(moved, 1)[None]
            kept.update(keys, values, layer_idx)
        choice = torch.tensor(tokenizer(prompt + CHOICES[index][0])["input_ids"][len(ids) :])
        logits = read(receiver, torch.cat([ids[-1:], choice[:-1]]), kept)
        expected = logits.log_softmax(-1).gather(1, choice[:, None]).sum()
        assert scores[index][0].logprob == pytest.approx(expected.item(), abs=1e-3)
        in_prompt = plain.score([Query(text)], [CHOICES[index]])[0][0].logprob
        assert few_shot[index][0].logprob == pytest.approx(in_prompt, abs=1e-3)
    assert any(a[0].logprob != pytest.approx(b[0].logprob, abs=0.05) for a, b in zip(scores, unlike, strict=True))
    with pytest.raises(ValueError, match="`examples` must hold other questions"):
        oracle.score([Query(PROMPTS[0])], CHOICES[:1])
    assert len(oracle.generate(queries, 3)) == len(queries)


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
