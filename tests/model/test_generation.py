"""Every mode and cache that `generate` has: against a full re-computation, and closed against the receiver."""

import importlib.util
from typing import Any

import pytest
import torch
from conftest import close_gates, pad_rows, random_ids, randomize_fuser, tiny_c2c, tiny_model
from tokenizers_for_tests import byte_level_tokenizer
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    QuantizedCache,
    StaticCache,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from c2c_hf import C2CCache, C2CForCausalLM
from c2c_hf._compat import CACHE_ARGUMENT


class BanEvenTokens(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ::2] = -torch.inf
        return scores


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "min_p": {"do_sample": True, "min_p": 0.05},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logits_processor": [BanEvenTokens()]},
    "end_token": {"eos_token_id": list(range(3, 20)), "min_new_tokens": 2},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
}


def prompt(mode: str) -> dict[str, torch.Tensor]:
    """Two unequal rows; one where the mode takes no more."""
    rows = [random_ids(11, seed=3), random_ids(7, seed=4)]
    rows = rows[:1] if mode == "prompt_lookup" else rows
    return {
        "input_ids": pad_rows(rows, "left"),
        "attention_mask": pad_rows([torch.ones_like(r) for r in rows], "left"),
    }


def run(model: torch.nn.Module, mode: str, **kwargs) -> torch.Tensor:
    torch.manual_seed(7)
    arguments = {"max_new_tokens": 9, "do_sample": False, **MODES.get(mode, {}), **kwargs}
    return model.generate(**prompt(mode), **arguments)


@pytest.mark.parametrize(
    ("receiver", "mode"),
    # transformers before 5.24 cannot look up prompts with sliding layers itself.
    [
        (receiver, mode)
        for receiver in ("llama", "gemma3")
        for mode in MODES
        if (receiver, mode) != ("gemma3", "prompt_lookup")
    ],
)
def test_closed_equals_the_receiver(receiver: str, mode: str) -> None:
    model = close_gates(tiny_c2c(receiver, ["qwen3"]))
    expected = run(model.receiver, mode)
    assert torch.equal(run(model, mode), expected)
    with model.disable_fusion():
        assert torch.equal(run(model, mode), expected)


@pytest.mark.parametrize("fuse_response", [False, True])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "prompt_lookup"])
def test_equals_recomputation(mode: str, fuse_response: bool) -> None:
    """`use_cache=False` reads prompt and answer anew for every token, with all models."""
    model = tiny_c2c("llama", ["gemma3"], fuse_response=fuse_response)
    answer = run(model, mode)
    assert torch.equal(answer, run(model, mode, use_cache=False))
    assert not torch.equal(answer, run(model.receiver, mode)), "fusion changes nothing, so nothing was compared"


@pytest.mark.parametrize("fuse_response", [False, True])
@pytest.mark.parametrize("sharers", [["qwen3"], ["qwen3", "gemma3"]], ids=len)
def test_assisted_decoding(sharers: list[str], fuse_response: bool) -> None:
    """The receiver alone drafts, the fused model decides: the answer is that of greedy decoding."""
    model = tiny_c2c("llama", sharers, fuse_response=fuse_response)
    ids = random_ids(1, 10)
    expected = model.generate(input_ids=ids, max_new_tokens=14, do_sample=False)
    drafted = model.generate(input_ids=ids, max_new_tokens=14, do_sample=False, assistant_model=model.receiver)
    assert torch.equal(drafted, expected)
    looked_up = model.generate(input_ids=ids, max_new_tokens=14, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, expected)


def test_several_sharers_in_beams() -> None:
    """Lists of sharer inputs are repeated for every beam, like tensors."""
    model = tiny_c2c("llama", ["qwen3", "gemma3"])
    for mode in ("beams_returned", "return_sequences"):
        assert torch.equal(run(model, mode), run(model, mode, use_cache=False))


def test_scores_and_streamer() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    model = tiny_c2c()
    ids = random_ids(1, 10)
    streamer = Collect()
    out = model.generate(
        input_ids=ids,
        max_new_tokens=6,
        do_sample=False,
        streamer=streamer,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.tokens), out.sequences[0])
    assert torch.equal(torch.stack(out.scores, 1)[0].argmax(-1), out.sequences[0, 10:])
    # The logits are those of one pass over prompt and answer, whose fused region ends with the prompt.
    alignment = torch.arange(9)[None]
    whole = model(input_ids=out.sequences[:, :-1], sharer_input_ids=ids, sharer_alignment=alignment).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 9:], atol=1e-4, rtol=0)
    assert out[CACHE_ARGUMENT].get_seq_length() == 15


CACHES = ["dynamic", "static", "quantized", "offloaded", "c2c", "c2c-static"]


@pytest.mark.parametrize(
    ("receiver", "name"),
    # transformers quantizes the caches of models without sliding layers only.
    [
        (receiver, name)
        for receiver in ("llama", "gemma3")
        for name in CACHES
        if (receiver, name) != ("gemma3", "quantized")
    ],
)
def test_caches_passed_in(receiver: str, name: str) -> None:
    model = tiny_c2c(receiver, ["qwen3"])
    ids = prompt("greedy")["input_ids"]
    config = model.receiver.config
    if name == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads to the CPU from a CUDA device, which this machine lacks")
    if name == "quantized":
        _need_quanto()
    expected = run(model, "greedy")
    cache = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=40),
        "quantized": lambda: _quantized(config),
        "offloaded": lambda: DynamicCache(config=config, offloading=True),
        "c2c": C2CCache,
        "c2c-static": lambda: C2CCache(StaticCache(config=config, max_cache_len=40)),
    }[name]()
    out = run(model, "greedy", **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == ids.shape[1] + 8
    if name != "quantized":
        assert torch.equal(out, expected)


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded", "dynamic"])
def test_cache_implementation(implementation: str) -> None:
    model = tiny_c2c("llama", ["gemma3"])
    kwargs: dict[str, Any] = {"cache_implementation": implementation}
    if implementation == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads to the CPU from a CUDA device, which this machine lacks")
    if implementation == "quantized":
        _need_quanto()
        kwargs["cache_config"] = {"backend": "quanto", "nbits": 4, "q_group_size": 8}
    out = run(model, "greedy", **kwargs)
    if implementation != "quantized":
        assert torch.equal(out, run(model, "greedy"))
        assert torch.equal(run(model, "beams", **kwargs), run(model, "beams"))
        return
    # Rounding changes the answer; what must hold is that a closed fuser rounds as the receiver fed in the same chunks.
    close_gates(model)
    inputs = prompt("greedy")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    ours, plain = _quantized(model.receiver.config), _quantized(model.receiver.config)
    logits = model(**inputs, cache=ours, logits_to_keep=1).logits
    clean = DynamicCache()
    model.receiver(
        input_ids=inputs["input_ids"][:, :-1],
        attention_mask=inputs["attention_mask"][:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
        **{CACHE_ARGUMENT: clean},
    )
    for layer_idx, layer in enumerate(clean.layers):
        plain.update(layer.keys, layer.values, layer_idx)
    expected = model.receiver(
        input_ids=inputs["input_ids"][:, -1:],
        attention_mask=inputs["attention_mask"],
        position_ids=positions[:, -1:],
        use_cache=True,
        **{CACHE_ARGUMENT: plain},
    ).logits
    assert torch.equal(logits, expected)


def _need_quanto() -> None:
    if importlib.util.find_spec("optimum") is None:
        pytest.skip("transformers' quantized cache needs optimum-quanto (extra `[test]`)")


def _quantized(config) -> QuantizedCache:
    return QuantizedCache(backend="quanto", config=config, nbits=4, q_group_size=8)


def test_generation_config_of_the_receiver() -> None:
    model = tiny_c2c()
    model.receiver.generation_config.max_new_tokens = 4
    rebuilt = C2CForCausalLM.from_receiver_and_sharers(model.receiver, list(model.sharers), token_alignment="identity")
    assert rebuilt.generation_config.max_new_tokens == 4
    assert rebuilt.generate(input_ids=random_ids(1, 6)).shape == (1, 10)
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert rebuilt.generate(random_ids(1, 6), config).shape == (1, 9)


def test_stop_strings_and_pipeline(capsys: pytest.CaptureFixture) -> None:
    tokenizer = byte_level_tokenizer()
    model = _pair_for(tokenizer)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "The sharer reads the text"
    out = pipe(text, max_new_tokens=5, do_sample=False, return_full_text=False)
    inputs = tokenizer(text, return_tensors="pt")
    answer = model.generate(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")},
        max_new_tokens=5,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    new = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert out[0]["generated_text"] == new
    assert new.strip() in capsys.readouterr().out
    piece = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] + 1])
    stopped = model.generate(
        inputs["input_ids"], max_new_tokens=5, do_sample=False, stop_strings=[piece], tokenizer=tokenizer
    )
    assert stopped.shape[1] <= inputs["input_ids"].shape[1] + 2


def _pair_for(tokenizer) -> C2CForCausalLM:
    models = [tiny_model(name, seed, len(tokenizer)) for seed, name in enumerate(("llama", "qwen3"))]
    model = C2CForCausalLM.from_receiver_and_sharers(
        *models, token_alignment="identity", fuser_hidden_size=16, fuser_intermediate_size=16
    )
    return randomize_fuser(model, 2)


def test_chunked_prefill_is_refused() -> None:
    model = tiny_c2c()
    with pytest.raises(ValueError, match="`prefill_chunk_size` must be None, but got 4"):
        model.generate(input_ids=random_ids(1, 9), prefill_chunk_size=4)
    with model.disable_fusion():
        model.generate(input_ids=random_ids(1, 9), prefill_chunk_size=4, max_new_tokens=2)


def test_response_fusion_of_tokens_without_counterpart() -> None:
    """Tokens that no sharer has, in the prompt and among the answers, are computed by the receiver in both streams."""
    config = tiny_c2c("llama", ["gemma3"], fuse_response=True).config
    config.sharers[0].token_alignment = "first"
    model = randomize_fuser(C2CForCausalLM._from_config(config), 0)
    ids = random_ids(1, 6)
    table = torch.arange(len(model.token_table_0))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    # Every other answer token has no counterpart, nor has all of a prompt.
    model.token_table_0.copy_(table)
    answer = model.generate(input_ids=ids, **options)[0, 6:]
    for absent in (answer[::2], answer[1::2], ids[0]):
        model.token_table_0.copy_(table)
        model.token_table_0[absent] = -1
        found = model.generate(input_ids=ids, **options, **{CACHE_ARGUMENT: C2CCache()})
        assert torch.equal(found, model.generate(input_ids=ids, **options, use_cache=False))
