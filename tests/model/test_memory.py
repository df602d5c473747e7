"""Memory mode: exact where the sharer is the receiver and the map is the identity, whatever turns the keys."""

import pytest
import torch
from conftest import CONFIGS, VOCAB, enlarge_weights, random_ids, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoXConfig, LlamaConfig, PreTrainedModel, StaticCache

from c2c_hf import C2CCache, C2CForCausalLM
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.inference.rotary import layer_rotations

ROPES = {
    "linear": LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}),
    "yarn": LlamaConfig(
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.3,
        }
    ),
    "partial": GPTNeoXConfig(rotary_pct=0.5),
}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "use_parallel_residual": False,
}


def model_of(name: str, seed: int = 0) -> PreTrainedModel:
    if name in CONFIGS:
        return tiny_model(name, seed)
    config = type(ROPES[name]).from_dict({**ROPES[name].to_dict(), **_SIZES, "head_dim": 8})
    torch.manual_seed(seed)
    return enlarge_weights(AutoModelForCausalLM.from_config(config).eval())


NAMES = sorted([*CONFIGS, *ROPES])


def pair_of(name: str, num_sharers: int = 1, sink: int = 1) -> C2CForCausalLM:
    """Receiver and sharers are one model, and its states are taken as they are."""
    sharers = [model_of(name) for _ in range(num_sharers)]
    fields = {"mode": "memory", "memory_source_layers": 1, "memory_sink_tokens": sink}
    model = C2CForCausalLM.from_receiver_and_sharers(model_of(name), sharers, **fields)
    with torch.no_grad():
        for fuser in model.fuser:
            for memory_map in fuser.maps:
                # Token embeddings, where they are features, are not used.
                memory_map.out_proj.weight.copy_(torch.eye(*memory_map.out_proj.weight.shape))
                memory_map.out_proj.bias.zero_()
    return model.eval()


def with_context(rows: list[tuple[list[int], list[int]]], sink: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of prompts with contexts; a sharer reads the prompt's first tokens in front of its context."""
    width = max(len(prompt) + len(context) for prompt, context in rows)
    sharer_width = max(sink + len(context) for _, context in rows)
    shape, sharer_shape = (len(rows), width), (len(rows), sharer_width)
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "sharer_input_ids": torch.zeros(sharer_shape, dtype=torch.long),
        "sharer_attention_mask": torch.zeros(sharer_shape, dtype=torch.long),
        "sharer_alignment": torch.full(shape, -1),
    }
    for row, (prompt, context) in enumerate(rows):
        ids = torch.tensor([*prompt[:sink], *[0] * len(context), *prompt[sink:]])
        start, sharer_start = width - len(ids), sharer_width - sink - len(context)
        inputs["input_ids"][row, start:] = ids
        inputs["attention_mask"][row, start:] = 1
        inputs["sharer_input_ids"][row, sharer_start:] = torch.tensor([*prompt[:sink], *context])
        inputs["sharer_attention_mask"][row, sharer_start:] = 1
        first = start + sink
        inputs["sharer_alignment"][row, first : first + len(context)] = torch.arange(sharer_start + sink, sharer_width)
    return inputs


def whole_text(prompt: list[int], context: list[int], sink: int = 1) -> torch.Tensor:
    return torch.tensor([[*prompt[:sink], *context, *prompt[sink:]]])


PROMPTS = [random_ids(n, seed=n).tolist() for n in (6, 3, 9)]
CONTEXTS = [random_ids(n, seed=n + 50).tolist() for n in (14, 17, 5)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sink", [1, 2])
@torch.no_grad()
def test_the_memory_of_oneself_is_reading(name: str, sink: int) -> None:
    """Windows shorter than the context, other rope bases and scalings, learned positions, biases of distance."""
    model = pair_of(name, sink=sink)
    for prompt, context in zip(PROMPTS, CONTEXTS, strict=True):
        inputs = with_context([(prompt, context)], sink)
        whole = whole_text(prompt, context, sink)
        expected = model.receiver(input_ids=whole).logits
        logits = model(**inputs, logits_to_keep=1).logits
        torch.testing.assert_close(logits, expected[:, -1:], rtol=0, atol=1e-4)
        every = model(**inputs).logits
        after = whole.shape[1] - len(prompt) + sink
        torch.testing.assert_close(every[:, after:], expected[:, after:], rtol=0, atol=1e-4)
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1)
        read = model.receiver.generate(whole, max_new_tokens=8, do_sample=False, eos_token_id=-1)
        assert answer[0, -8:].tolist() == read[0, -8:].tolist()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_batches_of_unequal_contexts(name: str) -> None:
    """Also with a row that has none."""
    model = pair_of(name)
    rows = [*zip(PROMPTS, CONTEXTS, strict=True), (PROMPTS[0], [])]
    inputs = with_context(rows)
    logits = model(**inputs, logits_to_keep=1).logits
    every = model(**inputs).logits
    for row, (prompt, context) in enumerate(rows):
        expected = model.receiver(input_ids=whole_text(prompt, context)).logits[0, -1]
        torch.testing.assert_close(logits[row, -1], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(every[row, -1], expected, rtol=0, atol=1e-4)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_generate(name: str, mode: str) -> None:
    model = pair_of(name)
    rows = list(zip(PROMPTS, CONTEXTS, strict=True))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **MODES[mode]}
    if mode == "sampling":
        rows = rows[:1]
    torch.manual_seed(0)
    inputs = with_context(rows)
    answers = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    expected = []
    for prompt, context in rows:
        torch.manual_seed(0)
        whole = whole_text(prompt, context)
        expected.append(model.receiver.generate(whole, **options)[:, whole.shape[1] :])
    assert answers.tolist() == torch.cat(expected).tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
@torch.no_grad()
def test_several_sharers_stand_one_after_the_other(name: str) -> None:
    """Each reads by itself, so its memory is that of its own text at later positions."""
    model = pair_of(name, num_sharers=2)
    prompt, (first, second) = PROMPTS[0], CONTEXTS[:2]
    one, two = with_context([(prompt, first + second)]), with_context([(prompt, second)])
    joined = dict(one)
    halves = [one["sharer_alignment"].clone(), one["sharer_alignment"].clone()]
    halves[0][:, 1 + len(first) :] = -1
    halves[1][:, : 1 + len(first)] = -1
    slots = (halves[1] >= 0).nonzero()[:, 1]
    halves[1][:, slots] = torch.arange(1, 1 + len(second))
    joined["sharer_input_ids"] = [one["sharer_input_ids"][:, : 1 + len(first)], two["sharer_input_ids"]]
    joined["sharer_attention_mask"] = [torch.ones_like(ids) for ids in joined["sharer_input_ids"]]
    joined["sharer_alignment"] = halves
    logits = model(**joined, logits_to_keep=1).logits
    # By hand: the second memory's keys are those of positions 1, 2, ..., moved behind the first.
    rotations = layer_rotations(model.receiver, "receiver")
    caches = []
    for context in (first, second):
        own = DynamicCache()
        model.receiver.base_model(torch.tensor([[prompt[0], *context]]), use_cache=True, **{CACHE_ARGUMENT: own})
        caches.append(own)
    whole = DynamicCache()
    for layer_idx, rotation in enumerate(rotations):
        keys, values = caches[0].layers[layer_idx].keys, caches[0].layers[layer_idx].values
        later = caches[1].layers[layer_idx]
        free = rotation.remove(later.keys[0, :, 1:].transpose(0, 1), torch.arange(1, 1 + len(second)))
        moved = rotation.apply(free, torch.arange(1, 1 + len(second)) + len(first))
        whole.update(
            torch.cat([keys, moved.transpose(0, 1).unsqueeze(0)], dim=2),
            torch.cat([values, later.values[:, :, 1:]], dim=2),
            layer_idx,
        )
    expected = model.receiver(input_ids=torch.tensor([prompt[1:]]), **{CACHE_ARGUMENT: whole}).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_without_context_and_alone(name: str) -> None:
    model = pair_of(name)
    empty = with_context([(PROMPTS[0], [])])
    assert torch.equal(model(**empty).logits, model.receiver(input_ids=torch.tensor([PROMPTS[0]])).logits)
    inputs = with_context(list(zip(PROMPTS, CONTEXTS, strict=True)))
    with model.disable_fusion():
        logits = model(**inputs, logits_to_keep=1).logits
        answers = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=-1)[:, -5:]
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        torch.testing.assert_close(logits[row, -1], model.receiver(ids).logits[0, -1], rtol=0, atol=1e-4)
        alone = model.receiver.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)
        assert answers[row].tolist() == alone[0, -5:].tolist()


@pytest.mark.parametrize("make", [DynamicCache, C2CCache, "static"], ids=["dynamic", "c2c", "static"])
@torch.no_grad()
def test_later_turns_on_a_kept_cache(make) -> None:
    model = pair_of("llama")
    prompt, context, more = PROMPTS[0], CONTEXTS[0], PROMPTS[2]
    cache = StaticCache(config=model.receiver.config, max_cache_len=64) if make == "static" else make()
    inputs = with_context([(prompt, context)])
    model(**inputs, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    # The next turn says nothing of the sharer, or the same as before.
    later = torch.tensor([more])
    mask = torch.ones(1, inputs["input_ids"].shape[1] + len(more), dtype=torch.long)
    logits = model(input_ids=later, attention_mask=mask, **{CACHE_ARGUMENT: cache}).logits
    expected = model.receiver(torch.cat([whole_text(prompt, context), later], 1)).logits
    torch.testing.assert_close(logits[:, -1], expected[:, -1], rtol=0, atol=1e-4)
    # A turn with a memory of its own.
    cache = DynamicCache()
    model(input_ids=torch.tensor([prompt]), **{CACHE_ARGUMENT: cache})
    inputs = with_context([(more, context)], sink=2)
    past = torch.ones(1, len(prompt), dtype=torch.long)
    inputs["attention_mask"] = torch.cat([past, inputs["attention_mask"]], 1)
    assert model(**inputs, **{CACHE_ARGUMENT: cache}).logits.isfinite().all()


def test_gradients_reach_the_map_and_nothing_else() -> None:
    model = pair_of("llama")
    inputs = with_context(list(zip(PROMPTS, CONTEXTS, strict=True)))
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    model.train()(**inputs, labels=labels, logits_to_keep=3).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.fuser.parameters())
    assert all(p.grad is None for p in model.receiver.parameters())


def test_refused() -> None:
    model = pair_of("llama")
    inputs = with_context([(PROMPTS[0], CONTEXTS[0])])
    with pytest.raises(ValueError, match="`sharer_alignment` must be given with `mode='memory'`"):
        model(**{**inputs, "sharer_alignment": None})
    with pytest.raises(ValueError, match="must hold positions below 15"):
        model(**{**inputs, "sharer_alignment": inputs["sharer_alignment"] + 1})
    last = inputs["sharer_alignment"].clone()
    last[:, -1] = 3
    with pytest.raises(ValueError, match="the last token of a prompt is a slot"):
        model(**{**inputs, "sharer_alignment": last})
    two = pair_of("llama", num_sharers=2)
    doubled = {name: [value, value] if "sharer" in name else value for name, value in inputs.items()}
    with pytest.raises(ValueError, match="two sharers fill the same slot"):
        two(**doubled)
    with pytest.raises(ValueError, match="needs `token_alignment='span'`"):
        C2CForCausalLM.from_receiver_and_sharers(
            tiny_model("llama"), tiny_model("llama"), mode="memory", token_alignment="identity"
        )


def test_unknown_rotations_are_refused() -> None:
    model = tiny_model("llama")
    original = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: original(
        *args, **{**kwargs, "position_embeddings": tuple(p * p for p in kwargs["position_embeddings"])}
    )
    with pytest.raises(
        ValueError, match="have a rotary position that `mode=.memory.. and `unrotate_keys=True` do not"
    ):
        layer_rotations(model, "receiver")
