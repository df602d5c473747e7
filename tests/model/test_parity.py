"""The reference's numbers: caches, logits, greedy answers and gradients of all its recorded cases.

What the numbers are and how they were made: `tests/data/parity/README.md`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor

from c2c_hf import C2CCache, C2CForCausalLM, convert_reference_checkpoint
from c2c_hf._compat import CACHE_ARGUMENT

PARITY = Path(__file__).parents[1] / "data" / "parity"
CASES = {case["name"]: case for case in json.loads((PARITY / "cases.json").read_text())["cases"]}
TOLERANCE = 1e-4


def build(case: dict, **kwargs) -> C2CForCausalLM:
    model = convert_reference_checkpoint(
        [PARITY / "checkpoints" / name for name in case["checkpoints"]],
        AutoModelForCausalLM.from_pretrained(PARITY / "models" / case["receiver"], attn_implementation="eager"),
        [
            AutoModelForCausalLM.from_pretrained(PARITY / "models" / name, attn_implementation="eager")
            for name in case["sharers"]
        ],
        fusion_mode=case["fusion_mode"],
        fuse_response=case["include_response"],
        **kwargs,
    )
    if case["gate_override"] is not None:
        for name, parameter in model.named_parameters():
            if "gate_logit" in name:
                parameter.data.fill_(case["gate_override"])
    return model


def alignments(case: dict, start: int, length: int, bits: int, batch: int) -> list[torch.Tensor]:
    """One section's alignment for every sharer: each position reads its own, or nothing where the bit is off."""
    own = torch.arange(start, start + length).expand(batch, length)
    return [own if bits > 0 and bits >> k & 1 else torch.full_like(own, -1) for k in range(len(case["sharers"]))]


def read_sections(model: C2CForCausalLM, case: dict, data: dict):
    """Feed a prompt section by section, each over the fused cache of those before it, as the reference does."""
    cache = C2CCache()
    ids = data["input_ids.0"]
    sharer_ids, sharer_mask = data.get("input_ids.1", ids), data.get("attention_mask.1", data["attention_mask.0"])
    batch = ids.shape[0]
    start, outputs = 0, None
    for length, bits in case["sections"]:
        end = start + length
        # The reference counts positions from the first column, padding included: said explicitly here.
        positions = torch.arange(end).expand(batch, end)
        many = len(case["sharers"])
        outputs = model(
            input_ids=ids[:, start:end],
            attention_mask=data["attention_mask.0"][:, :end],
            position_ids=positions[:, start:],
            cache=cache,
            sharer_input_ids=[sharer_ids[:, :end]] * many,
            sharer_attention_mask=[sharer_mask[:, :end]] * many,
            sharer_position_ids=[positions] * many,
            sharer_alignment=alignments(case, start, length, bits, batch),
        )
        start = end
    return outputs, cache


def assert_cache(cache, data: dict, mask: torch.Tensor) -> None:
    for layer_idx, layer in enumerate(cache.layers):
        for name, states in (("key", layer.keys), ("value", layer.values)):
            expected = data[f"fused.{layer_idx}.{name}"]
            where = mask.bool()[:, None, :, None].expand_as(expected)
            torch.testing.assert_close(states[where], expected[where], atol=TOLERANCE, rtol=0)


PROMPT_CASES = [name for name, case in CASES.items() if name not in ("train_step",) and not case["include_response"]]


@pytest.mark.parametrize("name", PROMPT_CASES)
def test_prompt_fusion(name: str) -> None:
    case = CASES[name]
    data = load_file(PARITY / case["file"])
    model = build(case)
    outputs, cache = read_sections(model, case, data)
    mask = data["attention_mask.0"]
    assert_cache(cache, data, mask)
    torch.testing.assert_close(outputs.logits, data["logits_last_section"], atol=TOLERANCE, rtol=0)

    # While decoding, the reference hands on the mask of the prompt's first column only, and adds it to every score. A
    # row whose first column is padding so attends to all positions alike; any other attends to padding as well.
    batch, prompt_len = data["input_ids.0"].shape
    blind = (mask[:, 0] == 0)[:, None, None, None]
    for step in range(case["new_tokens"]):
        torch.testing.assert_close(outputs.logits[:, -1], data["generated_scores"][step], atol=TOLERANCE, rtol=0)
        token = data["generated_ids"][:, step : step + 1]
        if "eos_token_id" not in case["generate_kwargs"]:
            assert torch.equal(outputs.logits[:, -1:].argmax(-1), token)
        scores_mask = torch.zeros(batch, 1, 1, prompt_len + step + 1)
        scores_mask = scores_mask.masked_fill(blind, torch.finfo(torch.float32).min)
        position = torch.full((batch, 1), prompt_len + step)
        outputs = model(input_ids=token, attention_mask=scores_mask, position_ids=position, cache=cache)


# Not those where the reference's decoding mask, above, shows.
SINGLE_REGION = [name for name in PROMPT_CASES if name not in ("aligned_sections", "batch_leftpad")]


@pytest.mark.parametrize("name", SINGLE_REGION)
def test_generate(name: str) -> None:
    """The usual two sections are the default of `generate`."""
    case = CASES[name]
    data = load_file(PARITY / case["file"])
    model = build(case)
    ids, mask = data["input_ids.0"], data["attention_mask.0"]
    kwargs = {}
    bits = case["sections"][0][1]
    if bits != (1 << len(case["sharers"])) - 1:
        kwargs["sharer_alignment"] = alignments(case, 0, ids.shape[1] - 1, bits, ids.shape[0])
        kwargs["sharer_input_ids"] = [ids] * len(case["sharers"])
    if name == "eos_pad":
        eos, pad = case["generate_kwargs"]["eos_token_id"], case["generate_kwargs"]["pad_token_id"]

        class PadInPlaceOfEnd(LogitsProcessor):
            """The reference writes the pad token where a row chose the end token; transformers keeps the end token."""

            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                ends = scores.argmax(-1) == eos
                return torch.where(
                    ends.unsqueeze(1), torch.nn.functional.one_hot(torch.tensor(pad), scores.shape[1]).float(), scores
                )

        kwargs.update(logits_processor=[PadInPlaceOfEnd()], eos_token_id=pad, pad_token_id=pad)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32, do_sample=False, **kwargs)
    new = out[:, ids.shape[1] :]
    expected = data["generated_ids"]
    assert torch.equal(new, expected[:, : new.shape[1]])
    assert new.shape[1] == expected.shape[1] or (expected[:, new.shape[1] :] == kwargs["pad_token_id"]).all()


@pytest.mark.parametrize("name", [name for name in SINGLE_REGION if name != "eos_pad"])
def test_receiver_alone(name: str) -> None:
    case = CASES[name]
    data = load_file(PARITY / case["file"])
    model = build(case)
    with model.disable_fusion():
        out = model.generate(input_ids=data["input_ids.0"], max_new_tokens=32, do_sample=False)
    assert torch.equal(out[:, data["input_ids.0"].shape[1] :], data["receiver_alone_generated_ids"])


@pytest.mark.parametrize("name", ["include_response", "include_response_long_tail"])
def test_response_fusion(name: str) -> None:
    case = CASES[name]
    data = load_file(PARITY / case["file"])
    model = build(case)
    ids, mask = data["input_ids.0"], data["attention_mask.0"]
    last_section = case["sections"][-1][0]
    outputs = model(input_ids=ids, attention_mask=mask, logits_to_keep=last_section)
    assert_cache(outputs[CACHE_ARGUMENT], data, mask)
    torch.testing.assert_close(outputs.logits, data["logits_last_section"], atol=TOLERANCE, rtol=0)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=32,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, ids.shape[1] :], data["generated_ids"])
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, data["generated_scores"][step], atol=TOLERANCE, rtol=0)


def test_train_step(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["train_step"]
    data = load_file(PARITY / case["file"])
    model = build(case, fuser_dropout=0.0).train()
    fuser = model.fuser[0]
    fuser.gate_temperature.fill_(case["gate_temperature"])
    prompt_length, answer_length = (length for length, _ in case["sections"])
    ids = data["input_ids.0"]

    def recorded_uniform(shape, **kwargs) -> torch.Tensor:
        """`(entries, tokens, heads)`; tokens run row by row over the aligned positions."""
        (group,) = fuser.groups
        draws = []
        for entry in group.entries:
            kind = "key" if entry < fuser.num_layers else "value"
            uniform = data[f"uniform.{entry % fuser.num_layers}.{kind}"]
            draws.append(uniform.squeeze(-1).transpose(1, 2).flatten(0, 1))
        stacked = torch.stack(draws)
        assert stacked.shape == tuple(shape)
        return stacked

    monkeypatch.setattr(torch, "rand", recorded_uniform)
    alignment = torch.full_like(ids, -1)
    alignment[:, :prompt_length] = torch.arange(prompt_length)
    cache = DynamicCache()
    outputs = model(
        input_ids=ids,
        attention_mask=data["attention_mask.0"],
        position_ids=data["position_ids"],
        labels=data["labels"],
        logits_to_keep=answer_length,
        cache=cache,
        sharer_input_ids=ids,
        sharer_attention_mask=data["attention_mask.0"],
        sharer_position_ids=data["position_ids"],
        sharer_alignment=alignment,
    )
    assert_cache(cache, data, data["attention_mask.0"])
    torch.testing.assert_close(outputs.logits, data["logits_last_section"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(outputs.loss, data["loss"][0], atol=0, rtol=TOLERANCE)
    outputs.loss.backward()
    compared = 0
    for layer_idx in range(fuser.num_layers):
        for kind, entry in (("key", layer_idx), ("value", fuser.num_layers + layer_idx)):
            group, row = fuser.locate(entry)
            for parameter_name, parameter in group.named_parameters():
                theirs = THEIR_NAMES[parameter_name].format(kind=kind)
                expected = data[f"grad.projector_{layer_idx}.{theirs}"]
                scale = expected.abs().max().clamp_min(1e-8)
                error = (parameter.grad[row] - expected).abs().max() / scale
                assert error < TOLERANCE, (parameter_name, float(error))
                compared += 1
    assert compared == sum(name.startswith("grad.") for name in data)
    assert all(p.grad is None for p in model.receiver.parameters())


THEIR_NAMES = {
    "gate.gate_logit": "{kind}_gate_logit",
    "projector.in_proj.weight": "{kind}_in.weight",
    "projector.in_proj.bias": "{kind}_in.bias",
    "projector.shared_ffn.norm.weight": "{kind}_mlp1.blocks.0.norm.weight",
    "projector.shared_ffn.up_proj.weight": "{kind}_mlp1.blocks.0.w1.weight",
    "projector.shared_ffn.down_proj.weight": "{kind}_mlp1.blocks.0.w2.weight",
    "projector.weight_ffn.norm.weight": "{kind}_scalar_mlp2.blocks.0.norm.weight",
    "projector.weight_ffn.up_proj.weight": "{kind}_scalar_mlp2.blocks.0.w1.weight",
    "projector.weight_ffn.down_proj.weight": "{kind}_scalar_mlp2.blocks.0.w2.weight",
    "projector.weight_proj.weight": "{kind}_scalar_head.weight",
    "projector.weight_proj.bias": "{kind}_scalar_head.bias",
    "projector.feature_ffns.0.norm.weight": "{kind}_proj_mlp2.blocks.0.norm.weight",
    "projector.feature_ffns.0.up_proj.weight": "{kind}_proj_mlp2.blocks.0.w1.weight",
    "projector.feature_ffns.0.down_proj.weight": "{kind}_proj_mlp2.blocks.0.w2.weight",
    "projector.out_proj.weight": "{kind}_proj_out.weight",
    "projector.out_proj.bias": "{kind}_proj_out.bias",
}
