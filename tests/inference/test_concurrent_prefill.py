"""Concurrent prefills: models run at the same time where that is faster, and no result changes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

import pytest
import torch
from conftest import random_ids, tiny_c2c, tiny_model
from transformers import PreTrainedModel

import c2c_hf.inference.prefill as prefill_module
import c2c_hf.modeling_c2c as modeling_module
from c2c_hf import C2CForCausalLM, SharerCache
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.inference.prefill import MAX_CONCURRENT_TOKENS, cached_states, run_concurrently

COLOUR: ContextVar[str] = ContextVar("colour")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def two_models() -> list[PreTrainedModel]:
    return [tiny_model("llama"), tiny_model("qwen3")]


def run_all(calls: list[Callable], models: list[PreTrainedModel], num_tokens: int = 8) -> list:
    first, others = run_concurrently(calls[0], calls[1:], models, num_tokens)
    return [first, *others]


def threads_of(models: list[PreTrainedModel], num_tokens: int = 8) -> list[threading.Thread]:
    return run_all([threading.current_thread] * len(models), models, num_tokens)


def test_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=60)

    def meet() -> threading.Thread:
        # None passes before all are there.
        meeting.wait()
        return threading.current_thread()

    threads = run_all([meet] * 3, [*two_models(), tiny_model("gpt2")], MAX_CONCURRENT_TOKENS)
    assert threads[0] is threading.current_thread()
    assert len(set(threads)) == 3
    assert not any(thread.is_alive() for thread in threads[1:])


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "elsewhere": lambda model: model.to("meta"),
    "one thread": lambda model: torch.set_num_threads(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_in_turn(name: str) -> None:
    models = two_models()
    CHANGES[name](models[1])
    assert threads_of(models) == [threading.current_thread()] * 2


def test_in_turn_where_nothing_is_gained() -> None:
    models = two_models()
    assert threads_of(models, MAX_CONCURRENT_TOKENS + 1) == [threading.current_thread()] * 2
    assert threads_of([models[0]] * 2) == [threading.current_thread()] * 2, "one model must not run twice at once"
    assert threads_of(models[:1]) == [threading.current_thread()]


MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.float16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("name", MODES)
def test_every_thread_has_the_modes_of_the_caller(name: str) -> None:
    def modes() -> tuple:
        product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
        return product.dtype, product.requires_grad, product.is_inference(), COLOUR.get()

    COLOUR.set("red")
    models = two_models()
    with MODES[name]():
        one, other = run_all([modes, modes], models)
    assert one == other


@pytest.mark.parametrize("failing", [0, 1])
def test_errors_arrive(failing: int) -> None:
    finished: list[int] = []

    def call(index: int) -> Callable[[], None]:
        def run() -> None:
            if index == failing:
                raise ValueError(f"prefill {index}")
            finished.append(index)

        return run

    with pytest.raises(ValueError, match=f"prefill {failing}"):
        run_all([call(0), call(1)], two_models())
    assert finished == [1 - failing]


def outcome(model: C2CForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits, all states and the fuser's gradients of a forward pass with a loss."""
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 6, -100)
    model.fuser.zero_grad()
    out = model(input_ids=ids, labels=labels, use_cache=True)
    out.loss.backward()
    states = [state for pair in cached_states(out[CACHE_ARGUMENT]) for state in pair]
    gradients = [parameter.grad for parameter in model.fuser.parameters() if parameter.grad is not None]
    assert gradients
    return [out.logits, *states, *gradients]


@pytest.mark.parametrize(
    ("receiver", "sharers", "fields"),
    [
        ("llama", ["qwen3"], {}),
        ("gemma3", ["gpt2", "bloom"], {}),
        ("qwen3", ["llama", "mistral"], {"fuse_response": True}),
    ],
)
def test_nothing_else_changes(
    receiver: str, sharers: list[str], fields: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    prefill_sharer = modeling_module.prefill_sharer

    def recorded(*args) -> SharerCache:
        threads.append(threading.current_thread())
        return prefill_sharer(*args)

    monkeypatch.setattr(modeling_module, "prefill_sharer", recorded)
    model, ids = tiny_c2c(receiver, sharers, **fields), random_ids(2, 11)
    together = outcome(model, ids)
    assert len(threads) == len(sharers)
    assert threading.current_thread() not in threads
    monkeypatch.setattr(prefill_module, "MAX_CONCURRENT_TOKENS", 0)
    threads.clear()
    apart = outcome(model, ids)
    assert threads == [threading.current_thread()] * len(sharers)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)
