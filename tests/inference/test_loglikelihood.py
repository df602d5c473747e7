"""Scores of continuations: as one whole pass over every prompt with every continuation."""

import pytest
import torch
from conftest import CONFIGS, tiny_c2c, tiny_model

from c2c_hf import C2CForCausalLM
from c2c_hf.inference.loglikelihood import continuation_scores

CONTINUATIONS = [[[5, 6, 7], [9]], [[1, 2]], [[4], [8, 8, 8, 3]]]


def padded_prompts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 60, (3, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :4] = 0
    attention_mask[2, :7] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_as_one_pass_each(name: str, fused: bool) -> None:
    if fused:
        model = tiny_c2c(name, ["llama"])
    else:
        model = tiny_model(name).eval()
    inputs = padded_prompts()
    scores = continuation_scores(model, inputs, CONTINUATIONS)
    row = 0
    for ids, mask, continuations in zip(inputs["input_ids"], inputs["attention_mask"], CONTINUATIONS, strict=True):
        prompt = ids[mask.bool()].unsqueeze(0)
        for continuation in continuations:
            whole = torch.cat([prompt, torch.tensor([continuation])], dim=1)
            extra = {}
            if fused:
                labels = whole.clone()
                labels[:, : prompt.shape[1]] = -100
                extra["labels"] = labels
            logits = model(input_ids=whole, **extra).logits[:, prompt.shape[1] - 1 : -1].float().log_softmax(-1)[0]
            expected = logits.gather(1, torch.tensor(continuation).unsqueeze(1)).squeeze(1)
            length = len(continuation)
            torch.testing.assert_close(scores.logprobs[row, :length], expected, rtol=0, atol=1e-4)
            assert not scores.logprobs[row, length:].any() and scores.is_token[row].sum() == length
            assert bool(scores.is_greedy[row]) == (logits.argmax(-1).tolist() == continuation)
            row += 1
    assert row == len(scores.logprobs)


@torch.no_grad()
def test_greedy_continuations_are_recognized() -> None:
    model = tiny_c2c("qwen3", ["llama"])
    inputs = {name: value[:1] for name, value in padded_prompts().items()}
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)[0, 9:].tolist()
    scores = continuation_scores(model, inputs, [[answer, [*answer[:-1], answer[-1] + 1]]])
    assert scores.is_greedy.tolist() == [True, False]


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_in_parts(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary and many continuations do not fill the memory: a part at a time gives the same."""
    model = tiny_c2c("llama", ["qwen3"]) if fused else tiny_model("llama")
    expected = continuation_scores(model, padded_prompts(), CONTINUATIONS)
    for rows in (1, 2, 3):
        passes: list[int] = []
        vocab_size = model.config.get_text_config().vocab_size
        monkeypatch.setattr("c2c_hf.inference.loglikelihood.MAX_LOGITS", rows * 4 * vocab_size)
        hook = model.register_forward_hook(lambda *_, seen=passes: seen.append(1))
        found = continuation_scores(model, padded_prompts(), CONTINUATIONS)
        hook.remove()
        assert len(passes) == 1 + -(-5 // rows)
        assert torch.equal(found.is_token, expected.is_token) and torch.equal(found.is_greedy, expected.is_greedy)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)


def test_alone_scores_as_the_receiver() -> None:
    model = tiny_c2c("llama", ["qwen3"])
    inputs = padded_prompts()
    with torch.no_grad(), model.disable_fusion():
        ours = continuation_scores(model, inputs, CONTINUATIONS)
    with torch.no_grad():
        theirs = continuation_scores(model.receiver, inputs, CONTINUATIONS)
    assert torch.equal(ours.logprobs, theirs.logprobs)


def test_refused() -> None:
    model, inputs = tiny_model("llama"), padded_prompts()
    with pytest.raises(ValueError, match="`continuations` must hold at least one per prompt"):
        continuation_scores(model, inputs, CONTINUATIONS[:2])
    with pytest.raises(ValueError, match="none that is empty"):
        continuation_scores(model, inputs, [[[1]], [[]], [[2]]])
    inputs["attention_mask"][0, -1] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        continuation_scores(model, inputs, CONTINUATIONS)


def test_the_head_multiplies_a_copy() -> None:
    """Behind a fused prompt and for plain models scored here, where a slice is slow; not for a receiver by itself."""
    model = tiny_model("llama", 0).to(torch.bfloat16)
    pair = C2CForCausalLM.from_receiver_and_sharers(
        model, tiny_model("llama", 1).to(torch.bfloat16), token_alignment="span", fuser_hidden_size=8
    )
    head, seen = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    ids = torch.ones(3, 6, dtype=torch.long)
    alignment = torch.tensor([[0, 1, 2, -1, -1, -1]]).expand(3, -1)
    with torch.no_grad():
        pair(ids, sharer_input_ids=ids, sharer_alignment=alignment, logits_to_keep=1)
        with pair.disable_fusion():
            pair(ids, logits_to_keep=1)
        continuation_scores(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [[[1]]] * 3)
    assert seen == [True, False, True]
