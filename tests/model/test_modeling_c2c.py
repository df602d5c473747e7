"""The forward pass: against the naive fuser, row by row, padded, in later turns, and closed."""

import pytest
import torch
import torch.nn.functional as F
import transformers.masking_utils
from conftest import PAIRS, close_gates, pad_rows, pair_id, random_ids, tiny_c2c
from naive import naive_greedy, naive_prefill, own_positions
from transformers import DynamicCache

from c2c_hf import C2CCache
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.fusers.c2c import _version

TOLERANCE = {"atol": 1e-4, "rtol": 0}


def random_alignment(length: int, sharer_length: int, seed: int) -> torch.Tensor:
    """A span-like alignment: rising, with gaps, nothing at the last position."""
    generator = torch.Generator().manual_seed(seed)
    alignment = torch.randint(0, sharer_length, (length,), generator=generator).sort().values
    alignment[torch.rand(length, generator=generator) < 0.3] = -1
    alignment[-1] = -1
    return alignment


@pytest.mark.parametrize("fusion_mode", ["parallel", "sequential"])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_equals_naive_fusion(pair: tuple[str, list[str]], fusion_mode: str) -> None:
    """Sliding windows shorter than the prompt on either side, MQA, GQA, MHA, unequal depth, no rope at all."""
    receiver, sharers = pair
    model = tiny_c2c(receiver, sharers, fusion_mode=fusion_mode, layer_alignment="depth_normalized")
    ids = random_ids(13)
    expected, cache = naive_prefill(model, ids, [ids] * len(sharers), own_positions(13, len(sharers)))
    outputs = model(input_ids=ids[None], cache=DynamicCache())
    torch.testing.assert_close(outputs.logits[0], expected, **TOLERANCE)
    for layer, naive_layer in zip(outputs[CACHE_ARGUMENT].layers, cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, naive_layer.keys, **TOLERANCE)
        torch.testing.assert_close(layer.values, naive_layer.values, **TOLERANCE)
    answer = model.generate(input_ids=ids[None], max_new_tokens=12, do_sample=False)[0, 13:]
    assert torch.equal(answer, naive_greedy(model, ids, [ids] * len(sharers), own_positions(13, len(sharers)), 12))
    with model.disable_fusion():
        alone = model(input_ids=ids[None]).logits[0]
    assert (alone[-1] - expected[-1]).abs().max() > 0.1, "the fuser changes nothing, so nothing was compared"


#: Fields of every fuser of fusion mode beside the default one.
FUSERS = {
    "complex": {"fuser_type": "c2c_complex"},
    "joint": {"joint_keys_values": True},
    "unrotated": {"unrotate_keys": True},
    "several-layers": {"layer_alignment": "learned", "fusion_source_layers": 2},
    "shared": {"fuser_type": "c2c_shared", "shared_hidden_size": 10, "shared_num_layers": 4},
    "shared-joint": {
        "fuser_type": "c2c_shared",
        "shared_hidden_size": 10,
        "shared_num_layers": 2,
        "joint_keys_values": True,
        "unrotate_keys": True,
        "layer_alignment": "depth_normalized",
    },
    "all-of-it": {
        "fuser_type": "c2c_complex",
        "joint_keys_values": True,
        "unrotate_keys": True,
        "layer_alignment": "learned",
        "fusion_source_layers": 3,
    },
}


@pytest.mark.parametrize("fusion_mode", ["parallel", "sequential"])
@pytest.mark.parametrize("name", FUSERS)
def test_other_fusers_equal_the_naive_one(name: str, fusion_mode: str) -> None:
    """With two sharers of unequal shapes, at any of their positions, in a second turn, and padded."""
    many, fields = 2, {"token_alignment": "span", "fusion_mode": fusion_mode, **FUSERS[name]}
    model = tiny_c2c("llama", ["qwen3", "llama"], **fields)
    ids, sharer_ids = random_ids(11, seed=1), [random_ids(15 - 6 * k, seed=2 + k) for k in range(many)]
    alignments = [random_alignment(11, len(own), seed=5 + k) for k, own in enumerate(sharer_ids)]
    expected, naive_cache = naive_prefill(model, ids, sharer_ids, alignments)
    inputs = {
        "input_ids": ids[None],
        "sharer_input_ids": [own[None] for own in sharer_ids],
        "sharer_alignment": [alignment[None] for alignment in alignments],
    }
    cache = C2CCache()
    torch.testing.assert_close(model(**inputs, cache=cache).logits[0], expected, **TOLERANCE)
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, 11:]
    assert torch.equal(answer, naive_greedy(model, ids, sharer_ids, alignments, 10))
    with model.disable_fusion():
        assert (model(input_ids=ids[None]).logits[0, -1] - expected[-1]).abs().max() > 0.1, "nothing was compared"

    # A second turn on the fused cache.
    more = random_ids(6, seed=9)
    longer = [torch.cat([own, random_ids(4, seed=20 + k)]) for k, own in enumerate(sharer_ids)]
    later = [random_alignment(6, len(own), seed=30 + k) for k, own in enumerate(longer)]
    expected, _ = naive_prefill(model, more, longer, later, naive_cache)
    found = model(
        input_ids=more[None],
        sharer_input_ids=[own[None] for own in longer],
        sharer_alignment=[alignment[None] for alignment in later],
        cache=cache,
    ).logits[0]
    torch.testing.assert_close(found, expected, **TOLERANCE)

    # Padding on the left of both texts changes no position.
    masks = [F.pad(torch.ones_like(own[None]), (3, 0)) for own in sharer_ids]
    padded_alignment = [
        F.pad(torch.where(alignment < 0, -1, alignment + 3), (2, 0), value=-1)[None] for alignment in alignments
    ]
    found = model(
        input_ids=F.pad(ids[None], (2, 0)),
        attention_mask=F.pad(torch.ones_like(ids[None]), (2, 0)),
        sharer_input_ids=[F.pad(own[None], (3, 0)) for own in sharer_ids],
        sharer_attention_mask=masks,
        sharer_alignment=padded_alignment,
    ).logits[0, 2:]
    torch.testing.assert_close(found, model(**inputs).logits[0], **TOLERANCE)


@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_texts_of_their_own(pair: tuple[str, list[str]]) -> None:
    """Sharers with other tokens than the receiver's, more or fewer, read at any of their positions."""
    receiver, sharers = pair
    model = tiny_c2c(receiver, sharers, token_alignment="span")
    ids = random_ids(11, seed=1)
    sharer_ids = [random_ids(15 - 6 * k, seed=2 + k) for k in range(len(sharers))]
    alignments = [random_alignment(11, len(own), seed=5 + k) for k, own in enumerate(sharer_ids)]
    expected, _ = naive_prefill(model, ids, sharer_ids, alignments)
    inputs = {
        "input_ids": ids[None],
        "sharer_input_ids": [own[None] for own in sharer_ids],
        "sharer_alignment": [alignment[None] for alignment in alignments],
    }
    torch.testing.assert_close(model(**inputs).logits[0], expected, **TOLERANCE)
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, 11:]
    assert torch.equal(answer, naive_greedy(model, ids, sharer_ids, alignments, 10))


LENGTHS = (3, 17, 9, 1, 12, 5, 2, 14)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_padded_rows_equal_rows_alone(pair: tuple[str, list[str]], side: str) -> None:
    """Eight unequal prompts in one batch: prefill on both sides, decoding on the left."""
    receiver, sharers = pair
    model = tiny_c2c(receiver, sharers)
    rows = [random_ids(length, seed=length) for length in LENGTHS]
    ids = pad_rows(rows, side)
    mask = pad_rows([torch.ones_like(row) for row in rows], side)
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row, row_logits, row_mask in zip(rows, logits, mask, strict=True):
        torch.testing.assert_close(row_logits[row_mask.bool()], model(input_ids=row[None]).logits[0], **TOLERANCE)
    if side == "right":
        return
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=32,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for index, row in enumerate(rows):
        alone = model.generate(
            input_ids=row[None], max_new_tokens=32, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        batch_logits = torch.stack([step[index] for step in out.logits])
        torch.testing.assert_close(batch_logits, torch.stack([step[0] for step in alone.logits]), **TOLERANCE)
        assert torch.equal(out.sequences[index, ids.shape[1] :], alone.sequences[0, len(row) :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_of_their_own(side: str) -> None:
    """Rows whose fused regions end at different positions, whose sharers read texts of unequal length."""
    model = tiny_c2c("gemma3", ["llama", "qwen3"], token_alignment="span")
    rows = [random_ids(length, seed=length) for length in (12, 7, 10)]
    sharer_rows = [
        [random_ids(length, seed=50 + length) for length in lengths] for lengths in ((9, 14, 4), (6, 3, 11))
    ]
    alignments = [
        [random_alignment(len(row), len(own), seed=len(own)) for row, own in zip(rows, own_rows, strict=True)]
        for own_rows in sharer_rows
    ]
    alignments[0][1][3:] = -1
    alignments[1][1][4:] = -1
    inputs = {
        "input_ids": pad_rows(rows, side),
        "attention_mask": pad_rows([torch.ones_like(row) for row in rows], side),
        "sharer_input_ids": [pad_rows(own, side) for own in sharer_rows],
        "sharer_attention_mask": [pad_rows([torch.ones_like(o) for o in own], side) for own in sharer_rows],
        "sharer_alignment": [],
    }
    for own_rows, own_alignments in zip(sharer_rows, alignments, strict=True):
        longest = max(len(own) for own in own_rows)
        shifted = [
            torch.where(a >= 0, a + (longest - len(own) if side == "left" else 0), -1)
            for a, own in zip(own_alignments, own_rows, strict=True)
        ]
        inputs["sharer_alignment"].append(pad_rows(shifted, side, value=-1))
    logits = model(**inputs).logits
    for index, row in enumerate(rows):
        expected, _ = naive_prefill(
            model, row, [own[index] for own in sharer_rows], [own[index] for own in alignments]
        )
        real = inputs["attention_mask"][index].bool()
        torch.testing.assert_close(logits[index][real], expected, **TOLERANCE)


@pytest.mark.parametrize("logits_to_keep", [1, 2, 5, torch.tensor([0, 4, -1])], ids=str)
def test_logits_to_keep(logits_to_keep: int | torch.Tensor) -> None:
    model = tiny_c2c()
    ids = random_ids(2, 9)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    everything = model(input_ids=ids, attention_mask=mask).logits
    kept = model(input_ids=ids, attention_mask=mask, logits_to_keep=logits_to_keep).logits
    expected = everything[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else everything[:, logits_to_keep]
    torch.testing.assert_close(kept, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("pair", "fields"),
    [(pair, {}) for pair in PAIRS] + [(("llama", ["qwen3", "llama"]), fields) for fields in FUSERS.values()],
    ids=[*map(pair_id, PAIRS), *FUSERS],
)
def test_closed_gates_change_nothing(pair: tuple[str, list[str]], fields: dict) -> None:
    receiver, sharers = pair
    model = close_gates(tiny_c2c(receiver, sharers, **fields))
    ids = random_ids(2, 10)
    chunks = DynamicCache(config=model.receiver.config)
    model.receiver(input_ids=ids[:, :9], use_cache=True, **{CACHE_ARGUMENT: chunks})
    expected = model.receiver(input_ids=ids[:, 9:], use_cache=True, **{CACHE_ARGUMENT: chunks}).logits
    assert torch.equal(model(input_ids=ids, logits_to_keep=1).logits, expected)
    with model.disable_fusion():
        assert torch.equal(model(input_ids=ids).logits, model.receiver(input_ids=ids).logits)
    assert model.fusion_enabled


@pytest.mark.parametrize("length", [1, 2])
def test_short_prompts(length: int) -> None:
    model = tiny_c2c()
    ids = random_ids(1, length)
    expected, _ = naive_prefill(model, ids[0], [ids[0]], own_positions(length))
    torch.testing.assert_close(model(input_ids=ids).logits[0], expected, **TOLERANCE)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, length + 3)


@pytest.mark.parametrize("kept", ["C2CCache", "DynamicCache", "sliding"])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
def test_later_turn(pair: tuple[str, list[str]], kept: str) -> None:
    """The second turn fuses its own tokens only, over what the first left; the answer in between is not fused."""
    receiver, sharers = pair
    model = tiny_c2c(receiver, sharers)
    many = len(sharers)
    first, second = random_ids(1, 9, seed=3), random_ids(1, 6, seed=4)
    sliding = DynamicCache(config=model.receiver.config)
    cache = {"C2CCache": C2CCache(sliding), "DynamicCache": DynamicCache(), "sliding": sliding}[kept]
    turn = model.generate(input_ids=first, max_new_tokens=5, do_sample=False, **{CACHE_ARGUMENT: cache})
    whole = torch.cat([turn, second], 1)
    seen = cache.get_seq_length()
    assert seen == turn.shape[1] - 1
    out = model.generate(input_ids=whole, max_new_tokens=8, do_sample=False, **{CACHE_ARGUMENT: cache})

    _, naive_cache = naive_prefill(model, first[0], [first[0]] * many, own_positions(9, many))
    for token in turn[0, 9:-1]:
        model.receiver(input_ids=token.view(1, 1), use_cache=True, **{CACHE_ARGUMENT: naive_cache})
    alignment = torch.arange(seen, whole.shape[1])
    alignment[-1] = -1
    logits, naive_cache = naive_prefill(model, whole[0, seen:], [whole[0]] * many, [alignment] * many, naive_cache)
    expected = [logits[-1].argmax()]
    for _ in range(7):
        step = model.receiver(input_ids=expected[-1].view(1, 1), use_cache=True, **{CACHE_ARGUMENT: naive_cache})
        expected.append(step.logits[0, -1].argmax())
    assert torch.equal(out[0, whole.shape[1] :], torch.stack(expected))


def test_later_turn_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a `C2CCache` a sharer reads only what is new, also after the text before it changed."""
    model = tiny_c2c()
    lengths = []
    sharer_forward = model.sharers[0].base_model.forward

    def counting(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return sharer_forward(*args, **kwargs)

    monkeypatch.setattr(model.sharers[0].base_model, "forward", counting)
    cache = C2CCache()
    first = model.generate(input_ids=random_ids(1, 9), max_new_tokens=4, do_sample=False, **{CACHE_ARGUMENT: cache})
    whole = torch.cat([first, random_ids(1, 6, seed=1)], 1)
    model.generate(input_ids=whole, max_new_tokens=1, do_sample=False, **{CACHE_ARGUMENT: cache})
    assert lengths == [8, 10]
    changed = whole.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 90 + 3
    assert cache.sharer_caches[0].common_prefix(changed, torch.ones_like(changed)) == 4


@pytest.mark.parametrize(
    ("pair", "fields"),
    [(PAIRS[0], {}), (PAIRS[3], {}), (PAIRS[-1], {}), (PAIRS[0], FUSERS["all-of-it"])],
    ids=[*map(pair_id, (PAIRS[0], PAIRS[3], PAIRS[-1])), "all-of-it"],
)
def test_fuse_response(pair: tuple[str, list[str]], fields: dict) -> None:
    """Every position of the cache, the answer's too, is the fuser applied to the clean streams."""
    receiver, sharers = pair
    model = tiny_c2c(receiver, sharers, fuse_response=True, **fields)
    rows = [random_ids(length, seed=length) for length in (11, 6)]
    ids, mask = pad_rows(rows, "left"), pad_rows([torch.ones_like(row) for row in rows], "left")
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    for index, row in enumerate(rows):
        text = out.sequences[index, ids.shape[1] - len(row) : -1]
        every = torch.arange(len(text))
        _, cache = naive_prefill(model, text, [text] * len(sharers), [every] * len(sharers))
        for layer, naive_layer in zip(out[CACHE_ARGUMENT].layers, cache.layers, strict=True):
            kept = min(layer.keys.shape[2], len(text))
            torch.testing.assert_close(layer.keys[index, :, -kept:], naive_layer.keys[0, :, -kept:], **TOLERANCE)
            torch.testing.assert_close(layer.values[index, :, -kept:], naive_layer.values[0, :, -kept:], **TOLERANCE)


def test_training_reaches_the_fuser_only() -> None:
    model = tiny_c2c("gemma3", ["llama"], fuser_dropout=0.1).train()
    assert not model.receiver.training
    assert not model.sharers.training
    ids = random_ids(2, 12)
    labels = ids.clone()
    labels[:, :8] = -100
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs = model(input_ids=ids, labels=labels)
    outputs.loss.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != name.startswith("fuser."), name


def test_loss_is_that_of_the_answer() -> None:
    """Labels end the prompt: the token before the first label is read over the fused cache."""
    model = tiny_c2c()
    ids = random_ids(2, 12)
    labels = ids.clone()
    labels[:, :7] = -100
    alignment = torch.arange(12).expand(2, 12).masked_fill(torch.arange(12) >= 6, -1)
    outputs = model(input_ids=ids, labels=labels)
    explicit = model(input_ids=ids, sharer_input_ids=ids, sharer_alignment=alignment).logits
    expected = torch.nn.functional.cross_entropy(explicit[:, 6:-1].flatten(0, 1), ids[:, 7:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    kept = model(input_ids=ids, labels=labels, logits_to_keep=6)
    torch.testing.assert_close(kept.loss, expected)
    assert kept.logits.shape[1] == 6


def test_loss_alone() -> None:
    """Where nothing fuses, `logits_to_keep` goes with the labels as well."""
    model = tiny_c2c()
    ids = random_ids(2, 12)
    labels = ids.clone()
    labels[:, :7] = -100
    expected = model.receiver(input_ids=ids, labels=labels).loss
    with model.disable_fusion():
        outputs = model(input_ids=ids, labels=labels, logits_to_keep=6)
    torch.testing.assert_close(outputs.loss, expected)
    nothing = torch.full_like(ids, -1)
    outputs = model(input_ids=ids, labels=labels, logits_to_keep=6, sharer_input_ids=ids, sharer_alignment=nothing)
    torch.testing.assert_close(outputs.loss, expected)


def test_bfloat16_receiver() -> None:
    """The fuser's parameters stay in float32 and compute in the receiver's dtype."""
    model = tiny_c2c()
    ids = random_ids(1, 9)
    expected = model(input_ids=ids).logits
    model.receiver.to(torch.bfloat16)
    model.sharers.to(torch.bfloat16)
    outputs = model(input_ids=ids)
    assert all(parameter.dtype == torch.float32 for parameter in model.fuser.parameters())
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs[CACHE_ARGUMENT].layers[0].keys.dtype == torch.bfloat16
    assert (outputs.logits.float() - expected).abs().max() < 0.15 * expected.abs().max()


def test_bad_inputs() -> None:
    model = tiny_c2c()
    ids = random_ids(2, 8)
    with pytest.raises(ValueError, match=r"`sharer_input_ids` must be of shape \(batch_size=2"):
        model(input_ids=ids, sharer_input_ids=ids[:1])
    with pytest.raises(ValueError, match=r"`sharer_alignment` must be of shape \(batch_size=2"):
        model(input_ids=ids, sharer_input_ids=ids, sharer_alignment=torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="must hold sharer positions from 0 to 7 or -1"):
        model(input_ids=ids, sharer_input_ids=ids, sharer_alignment=torch.full((2, 8), 8))
    with pytest.raises(ValueError, match="must hold sharer positions from 0 to 7 or -1"):
        model(input_ids=ids, sharer_input_ids=ids, sharer_alignment=torch.arange(-2, 6).expand(2, 8))
    with pytest.raises(ValueError, match="must hold integers"):
        model(input_ids=ids, sharer_input_ids=ids, sharer_alignment=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="`sharer_alignment` must be given where"):
        model(input_ids=ids, sharer_input_ids=random_ids(2, 5))
    with pytest.raises(ValueError, match="`sharer_attention_mask` must have the shape"):
        model(input_ids=ids, sharer_input_ids=ids, sharer_attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`sharer_input_ids` must hold one tensor per sharer \(1\)"):
        model(input_ids=ids, sharer_input_ids=[ids, ids])
    with pytest.raises(ValueError, match="`inputs_embeds`, since sharers prefill tokens"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match="Either `input_ids` or `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="the text has 300 tokens, but the context of .* is 256"):
        model(input_ids=random_ids(1, 301))
    span = tiny_c2c(token_alignment="span")
    with pytest.raises(ValueError, match="use `C2CProcessor` to make all inputs"):
        span(input_ids=ids)
    with pytest.raises(ValueError, match="use `C2CProcessor` to make all inputs"):
        span.generate(input_ids=ids)


def test_tuples_and_hidden_states() -> None:
    model = tiny_c2c()
    ids = random_ids(1, 8)
    outputs = model(input_ids=ids, output_hidden_states=True)
    assert outputs.hidden_states[0].shape == (1, 1, 32), "those of the tail, which is the last prompt token"
    logits, cache = model(input_ids=ids, return_dict=False)
    assert torch.equal(logits, outputs.logits)
    assert cache.get_seq_length() == 8
    assert CACHE_ARGUMENT not in model(input_ids=ids, use_cache=False)


def test_embeddings_in_place_of_ids() -> None:
    model = tiny_c2c()
    ids = random_ids(1, 8)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeds, sharer_input_ids=ids).logits, model(input_ids=ids).logits, **TOLERANCE
    )


@torch.no_grad()
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device numbers cannot be asked for: a forward pass asks for alignments alone, here on the CPU.

    What is queued on a GPU is then never waited for between the models, so that two devices work at once.
    """
    model = tiny_c2c(sharers=["qwen3", "gemma3"])
    # Each model of transformers looks once whether its mask hides anything.
    monkeypatch.setattr(transformers.masking_utils, "fast_all", lambda mask: True)
    groups = [group for fuser in model.fuser for group in fuser.groups]
    opened = [group.gate.open_entries() for group in groups]
    model.to("meta")
    for group, entries in zip(groups, opened, strict=True):
        # Gates are read once, and again when they have changed.
        group.gate._open = (_version(group.gate.gate_logit), entries)
    ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    columns = torch.arange(9)
    alignment = columns.masked_fill(columns == 8, -1).expand(2, -1)
    inputs = {"input_ids": ids, "sharer_input_ids": [ids, ids], "sharer_alignment": [alignment, alignment]}
    outputs = model(**inputs, logits_to_keep=1)
    assert (outputs.logits.shape, outputs.logits.device.type) == ((2, 1, 96), "meta")
    assert outputs[CACHE_ARGUMENT].get_seq_length() == 9
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        model(**{**inputs, "sharer_alignment": [alignment.to("meta")] * 2})
