"""One model serves several threads: both modes, fusion on and off in different threads, results as in one thread."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from conftest import random_ids, randomize_fuser, tiny_c2c, tiny_model

from c2c_hf import C2CForCausalLM

THREADS = 8


def fusion_model() -> C2CForCausalLM:
    # Closed gates among open ones, so that cast copies of some entries are shared as well.
    return randomize_fuser(tiny_c2c("llama", ["qwen3", "gpt2"]), seed=1).eval()


def memory_model() -> C2CForCausalLM:
    torch.manual_seed(0)
    return C2CForCausalLM.from_receiver_and_sharers(tiny_model("llama"), tiny_model("qwen3", 1), mode="memory").eval()


def fusion_inputs(seed: int) -> dict[str, torch.Tensor]:
    return {"input_ids": random_ids(1, 6 + seed % 5, seed=seed)}


def memory_inputs(seed: int) -> dict[str, torch.Tensor]:
    num_slots = 2 + seed % 4
    columns = torch.arange(num_slots + 5)
    alignment = torch.where((columns > 0) & (columns <= num_slots), columns - 1, -1)
    return {
        "input_ids": random_ids(1, num_slots + 5, seed=seed),
        "sharer_input_ids": random_ids(1, num_slots, seed=seed + 100),
        "sharer_alignment": alignment[None],
    }


@pytest.mark.parametrize("calls", [200, pytest.param(THREADS * 2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("build", "make_inputs"), [(fusion_model, fusion_inputs), (memory_model, memory_inputs)])
@pytest.mark.timeout(3600)
def test_threads_share_a_model(build, make_inputs, calls: int) -> None:
    model = build()

    def answer(call: int) -> list[int]:
        inputs = make_inputs(call // 2 % 10)
        with model.disable_fusion() if call % 2 else nullcontext():
            return model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()

    expected = [answer(call) for call in range(20)]
    assert expected[::2] != expected[1::2], "fusion changes nothing, so switching it off would not be noticed"
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(answer, range(calls)))
    assert found == [expected[call % 20] for call in range(calls)]
    assert model.fusion_enabled


def test_disabling_is_local_to_the_context() -> None:
    model, other = fusion_model(), fusion_model()
    with ThreadPoolExecutor(1) as pool, model.disable_fusion():
        assert not model.fusion_enabled
        assert other.fusion_enabled
        assert pool.submit(lambda: model.fusion_enabled).result()
        with model.disable_fusion():
            assert not model.fusion_enabled
        assert not model.fusion_enabled
    assert model.fusion_enabled
