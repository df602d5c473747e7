"""Models on other devices than the CPU, and on two: on the meta device, which computes nothing but refuses to mix
devices, and on CUDA where there is one."""

import copy
from typing import Any

import pytest
import torch
from conftest import PAIRS, pad_rows, pair_id, random_ids, randomize_fuser, tiny_c2c, tiny_model
from transformers import StaticCache

from c2c_hf import C2CCache, C2CForCausalLM, modeling_c2c
from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.benchmarks.gpu import count_synchronizations
from c2c_hf.fusers.c2c import FuserGroup

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PLACES = ["both", "sharers-on-cpu"]


def build(mode: str, receiver: str, sharers: list[str]) -> C2CForCausalLM:
    if mode == "fusion":
        return tiny_c2c(receiver, sharers)
    models = [tiny_model(name, seed) for seed, name in enumerate([receiver, *sharers])]
    return randomize_fuser(C2CForCausalLM.from_receiver_and_sharers(models[0], models[1:], mode="memory"), 3)


def place(model: C2CForCausalLM, device: str, where: str) -> None:
    model.receiver.to(device)
    model.fuser.to(device)
    if where == "both":
        model.sharers.to(device)


def inputs_of(model: C2CForCausalLM, device: str) -> dict[str, Any]:
    """A prompt whose alignment is on the CPU; each sharer has a text and, in memory mode, slots of its own."""
    count = model.config.num_sharers
    columns = torch.arange(12)[None]
    alignments = [columns.masked_fill(columns == 11, -1) for _ in range(count)]
    if model.config.mode == "memory":
        alignments = [torch.where((columns - 1) // 4 == i, (columns - 1) % 4, -1) for i in range(count)]
    return {
        "input_ids": random_ids(1, 12).to(device),
        "sharer_input_ids": [random_ids(1, 12, seed=i).to(device) for i in range(count)],
        "sharer_alignment": alignments,
    }


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("mode", ["fusion", "memory"])
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[3], PAIRS[5], PAIRS[7]], ids=pair_id)
@torch.no_grad()
def test_no_tensor_is_on_another_device(
    pair: tuple[str, list[str]], mode: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What depends on values: open gates, and padding, by which the plan is made on the CPU.
    monkeypatch.setattr(FuserGroup, "active_entries", lambda group: list(range(len(group.entries))))
    # There is no autocast on this device, and torch does not say so.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    plan = modeling_c2c.plan_memory_slots
    monkeypatch.setattr(
        modeling_c2c,
        "plan_memory_slots",
        lambda alignments, real, *rest: plan(alignments, torch.ones(real.shape, dtype=torch.bool), *rest),
    )
    model = build(mode, *pair)
    if mode == "memory":
        model.rotations()
    for base in (model.receiver, *model.sharers):
        # The other implementation looks at the values of masks, and a warning at those of ids.
        base.set_attn_implementation("eager")
        base.config.pad_token_id = None
    place(model, "meta", where)
    inputs = inputs_of(model, "meta")
    if where == "sharers-on-cpu":
        inputs["sharer_input_ids"] = inputs_of(model, "cpu")["sharer_input_ids"]
    outputs = model(**inputs)
    assert outputs.logits.shape == (1, 12, 96) and outputs.logits.device.type == "meta"
    assert {layer.keys.device.type for layer in outputs[CACHE_ARGUMENT].layers} == {"meta"}
    labels = inputs["input_ids"]
    model.train()
    with torch.enable_grad():
        model(**inputs, labels=labels, logits_to_keep=2).loss.backward()
    gradients = [parameter.grad for parameter in model.fuser.parameters()]
    assert all(gradient is not None and gradient.device.type == "meta" for gradient in gradients)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    @pytest.mark.parametrize("where", PLACES)
    @pytest.mark.parametrize("mode", ["fusion", "memory"])
    @pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
    @torch.no_grad()
    def test_equals_the_cpu(self, pair: tuple[str, list[str]], mode: str, where: str) -> None:
        model = build(mode, *pair)
        expected = model(**inputs_of(model, "cpu")).logits
        answer = model.generate(**inputs_of(model, "cpu"), **GREEDY)
        place(model, "cuda", where)
        logits = model(**inputs_of(model, "cuda")).logits
        torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=2e-3)
        cache = C2CCache()
        for _ in range(2):
            found = model.generate(**inputs_of(model, "cuda"), **GREEDY, **{CACHE_ARGUMENT: cache})
            assert torch.equal(found.cpu(), answer)

    @pytest.mark.parametrize("mode", ["fusion", "memory"])
    @torch.no_grad()
    def test_static_and_compiled_decoding(self, mode: str) -> None:
        model = build(mode, "llama", ["qwen3"])
        answer = model.generate(**inputs_of(model, "cpu"), **GREEDY)
        place(model, "cuda", "both")
        found = model.generate(**inputs_of(model, "cuda"), **GREEDY, cache_implementation="static")
        assert torch.equal(found.cpu(), answer)
        cache = C2CCache(StaticCache(config=model.receiver.config, max_cache_len=64))
        for _ in range(2):
            # The second time the text of the compiled steps must be known.
            found = model.generate(**inputs_of(model, "cuda"), **GREEDY, **{CACHE_ARGUMENT: cache})
            assert torch.equal(found.cpu(), answer)

    @torch.no_grad()
    def test_padded_rows_in_bfloat16(self) -> None:
        model = tiny_c2c("llama", ["gemma3"]).to("cuda", torch.bfloat16)
        rows = [random_ids(length, seed=length) for length in (5, 12, 9)]
        ids, mask = pad_rows(rows, "left").cuda(), pad_rows([torch.ones_like(row) for row in rows], "left").cuda()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        for index, row in enumerate(rows):
            alone = model(input_ids=row[None].cuda()).logits[0, -1]
            torch.testing.assert_close(logits[index], alone, rtol=0.1, atol=0.15)

    def test_training_step(self) -> None:
        model = tiny_c2c("llama", ["qwen3"])
        twin = copy.deepcopy(model).to("cuda").eval()
        ids = random_ids(2, 12)
        labels = ids.masked_fill(torch.arange(12) < 8, -100)
        losses = []
        for each, device in ((model.eval(), "cpu"), (twin, "cuda")):
            loss = each(input_ids=ids.to(device), labels=labels.to(device)).loss
            loss.backward()
            losses.append(float(loss))
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
        for own, other in zip(model.fuser.parameters(), twin.fuser.parameters(), strict=True):
            if own.grad is not None:
                torch.testing.assert_close(other.grad.cpu(), own.grad, rtol=1e-2, atol=1e-3)

    def test_synchronizations(self) -> None:
        """The alignment's, with which the plan is made, and what the masks of transformers ask."""
        model = tiny_c2c("llama", ["qwen3"], token_alignment="span").cuda()
        assert count_synchronizations(model, 24, 1) <= 4
