"""Answerers: scores and generated answers equal the models' own, batched or one by one."""

from collections.abc import Sequence

import pytest
import torch
from conftest import close_gates
from evaluation_for_tests import CHOICES, PROMPTS, pair
from naive import hidden_and_weight
from transformers import DynamicCache, PreTrainedModel

from c2c_hf._compat import CACHE_ARGUMENT
from c2c_hf.evaluation.methods.answerer import Answerer, ModelAnswerer, Query, prepend_text
from c2c_hf.evaluation.methods.baselines import TextToText
from c2c_hf.evaluation.methods.c2c_answerer import C2CAnswerer
from c2c_hf.evaluation.methods.controls import CONTROLS, Control, FusionOff
from c2c_hf.evaluation.methods.payload_ablations import PAYLOAD_ABLATIONS
from c2c_hf.inference.sharer_cache import SharerCache

QUERIES = [Query(prompt) for prompt in PROMPTS]
CHATS = [Query([{"role": "user", "content": prompt}]) for prompt in PROMPTS]


def answerers() -> dict[str, Answerer]:
    model, processor = pair(sharers=2)
    return {
        "receiver": ModelAnswerer(model.receiver, processor.tokenizer),
        "sharer": ModelAnswerer(model.sharers[0], processor.sharer_tokenizers[0]),
        "c2c": C2CAnswerer(model, processor),
        "fusion_off": C2CAnswerer(model, processor, FusionOff()),
    }


def naive_score(answerer: Answerer, prompt: str, choice: str) -> tuple[float, int, bool]:
    """One forward pass over prompt and continuation; C2C keeps fusion to the prompt by the processor's alignment."""
    tokenizer = answerer.tokenizer
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(answerer, C2CAnswerer) and answerer.control.uses_sharers:
        fused = answerer.processor(prompt)
        # The prompt's own alignment; tokens behind its end are not fused.
        inputs |= {name: fused[name] for name in ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment")}
    with torch.no_grad():
        if isinstance(answerer, C2CAnswerer) and not answerer.control.uses_sharers:
            logits = answerer.c2c_model.receiver(**inputs).logits
        else:
            logits = answerer.model(**inputs).logits
    logprobs = logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    targets = ids[0, len(prompt_ids) :]
    greedy = bool((logprobs.argmax(-1) == targets).all())
    return float(logprobs.gather(1, targets.unsqueeze(1)).sum()), len(targets), greedy


@pytest.mark.parametrize("name", ["receiver", "sharer", "c2c", "fusion_off"])
def test_scores_equal_a_full_forward(name: str) -> None:
    answerer = answerers()[name]
    scores = answerer.score(QUERIES, CHOICES)
    for prompt, choices, row in zip(PROMPTS, CHOICES, scores, strict=True):
        assert len(row) == len(choices)
        for choice, score in zip(choices, row, strict=True):
            logprob, num_tokens, greedy = naive_score(answerer, prompt, choice)
            assert score.logprob == pytest.approx(logprob, abs=1e-3)
            assert (score.num_tokens, score.is_greedy) == (num_tokens, greedy)


@pytest.mark.parametrize("queries", [QUERIES, CHATS], ids=["plain", "chat"])
@pytest.mark.parametrize("name", ["receiver", "sharer", "c2c"])
def test_batches_equal_single_queries(name: str, queries: list[Query]) -> None:
    answerer = answerers()[name]
    batch = answerer.score(queries, CHOICES)
    answers = answerer.generate(queries, 8, stop=["ke"])
    for index, query in enumerate(queries):
        (single,) = answerer.score([query], [CHOICES[index]])
        torch.testing.assert_close(
            [score.logprob for score in batch[index]], [score.logprob for score in single], atol=1e-4, rtol=0
        )
        assert answerer.generate([query], 8, stop=["ke"]) == [answers[index]]


def test_fusion_changes_scores_and_fusion_off_is_the_receiver() -> None:
    by_name = answerers()
    scores = {
        name: [score.logprob for row in by_name[name].score(CHATS, CHOICES) for score in row]
        for name in ("receiver", "c2c", "fusion_off")
    }
    torch.testing.assert_close(scores["fusion_off"], scores["receiver"], atol=1e-4, rtol=0)
    assert max(abs(a - b) for a, b in zip(scores["c2c"], scores["receiver"], strict=True)) > 0.1


def test_generated_answers_equal_those_of_the_model() -> None:
    model, processor = pair(sharers=2)
    answerer = C2CAnswerer(model, processor)
    inputs = processor(PROMPTS)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.batch_decode(out, skip_special_tokens=True)
    assert [answer.text for answer in answerer.generate(QUERIES, 6)] == expected


def test_answers_end_before_stop_strings() -> None:
    answerer = answerers()["receiver"]
    (whole,) = answerer.generate(QUERIES[:1], 12)
    assert len(whole.text) > 4
    stop = whole.text[3:5]
    (cut,) = answerer.generate(QUERIES[:1], 12, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.num_tokens < whole.num_tokens
    assert cut.prompt_tokens == whole.prompt_tokens == len(answerer.tokenizer(PROMPTS[0])["input_ids"])


def test_a_trailing_space_goes_to_the_continuation() -> None:
    answerer = answerers()["receiver"]
    spaced = answerer.score([Query("What is the capital of France? ")], [["Paris"]])
    assert spaced == answerer.score([Query("What is the capital of France?")], [[" Paris"]])


def test_conversations_that_continue() -> None:
    """A begun answer ends the prompt, in the template of each model."""
    answerer = answerers()["c2c"]
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The keeper"}]
    batch = answerer.tokenize([Query(chat, continues=True)], strip=True)
    assert answerer.tokenizer.decode(batch.input_ids[0]).endswith("The keeper")
    with pytest.raises(ValueError, match="one batch"):
        answerer.score([Query(chat, continues=True), QUERIES[0]], CHOICES[:2])


@pytest.mark.parametrize("control", ["c2c", "int8_states"])
def test_seconds_add_up(control: str) -> None:
    answerer = answerers()["c2c"]
    answerer.control = {**CONTROLS, **PAYLOAD_ABLATIONS}[control]
    answerer.generate(QUERIES, 4)
    seconds = answerer.seconds
    parts = (seconds.fusion, seconds.prefill, seconds.decode)
    assert min(parts) > 0
    # On the CPU the models run at the same time, unless the sharers' states are changed before fusion.
    assert (seconds.sharer > 0) == (control == "int8_states")
    assert seconds.sharer + sum(parts) <= seconds.total
    assert not any(fuser._forward_hooks or fuser._forward_pre_hooks for fuser in answerer.c2c_model.fuser)


class Unchanged(Control):
    """Gets the sharers' states, and leaves them as they are."""

    def change_states(self, sharer_cache: SharerCache, seeds: Sequence[int]) -> None:
        assert len(sharer_cache.input_ids) == len(seeds)


def test_prefilling_the_sharers_first_changes_no_score() -> None:
    answerer = answerers()["c2c"]
    together = answerer.score(QUERIES, CHOICES)
    answerer.control = Unchanged()
    first = answerer.score(QUERIES, CHOICES)
    assert answerer.seconds.sharer > 0
    assert first == together


def naive_gate_weight(answerer: C2CAnswerer, prompt: str) -> float:
    """The mean weight, one sharer, entry and token at a time."""
    model, processor = answerer.c2c_model, answerer.processor
    inputs = processor(prompt)
    weights: list[float] = []

    def states(base: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
        # Without its configuration the cache keeps what sliding windows would drop.
        layers = base(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: DynamicCache()})[CACHE_ARGUMENT].layers
        entries = [layer.keys for layer in layers] + [layer.values for layer in layers]
        return [entry[0].transpose(0, 1).flatten(1) for entry in entries]

    own = states(model.receiver, inputs["input_ids"])
    sharers = zip(model.fuser, model.sharers, inputs["sharer_input_ids"], inputs["sharer_alignment"], strict=True)
    for fuser, sharer, ids, alignment in sharers:
        sharer_states = states(sharer, ids)
        for position, aligned in enumerate(alignment[0].tolist()):
            for entry in range(2 * fuser.num_layers) if aligned >= 0 else ():
                _, weight = hidden_and_weight(
                    fuser, entry, sharer_states[fuser.sources[entry][0]][aligned], own[entry][position]
                )
                weights += weight.tolist()
    return sum(weights) / len(weights)


@torch.no_grad()
def test_gate_weights() -> None:
    answerer = answerers()["c2c"]
    answerer.score(QUERIES, CHOICES)
    found = answerer.gate_weights
    assert found == pytest.approx([naive_gate_weight(answerer, prompt) for prompt in PROMPTS], abs=1e-5)
    assert len(set(found)) > 1
    for index, query in enumerate(QUERIES):
        answerer.generate([query], 2)
        assert answerer.gate_weights == pytest.approx([found[index]], abs=1e-5)
    close_gates(answerer.c2c_model)
    answerer.score(QUERIES, CHOICES)
    assert answerer.gate_weights == [0.0] * len(QUERIES)
    answerer.control = FusionOff()
    answerer.score(QUERIES, CHOICES)
    assert answerer.gate_weights == []
    modules = [module for fuser in answerer.c2c_model.fuser for module in fuser.modules()]
    assert not any(module._forward_hooks for module in modules)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_text_to_text_prepends_what_the_sharer_generates(chat: bool) -> None:
    by_name = answerers()
    method = TextToText(by_name["sharer"], by_name["receiver"], max_background_tokens=5)
    question = "What is the capital of France?"
    request = "Write one sentence of background knowledge that helps to answer the question. Do not answer it."
    request, beginning = f"{request}\n\nQuestion: {question}", "It helps to know that"
    query, asked = Query(PROMPTS[0], question=question), Query(f"{request}\nBackground: {beginning}")
    if chat:
        query = Query(CHATS[0].prompt, question=question)
        begun = [{"role": "user", "content": request}, {"role": "assistant", "content": beginning}]
        asked = Query(begun, continues=True)
    (background,) = by_name["sharer"].generate([asked], 5, stop=("\n",))
    assert background.text.strip()
    text = f"Background: {beginning} {background.text.strip()}\n\n{PROMPTS[0]}"
    extended = Query([{"role": "user", "content": text}] if chat else text)
    assert method.score([query], CHOICES[:1]) == by_name["receiver"].score([extended], CHOICES[:1])
    (answer,) = method.generate([query], 4)
    (expected,) = by_name["receiver"].generate([extended], 4)
    assert answer.text == expected.text
    assert answer.num_tokens == expected.num_tokens + background.num_tokens
    assert method.seconds.total >= method.seconds.sharer > 0


def test_closed_gates_are_the_receiver() -> None:
    model, processor = pair()
    close_gates(model)
    (fused,) = C2CAnswerer(model, processor).score(QUERIES[:1], CHOICES[:1])
    (receiver,) = ModelAnswerer(model.receiver, processor.tokenizer).score(QUERIES[:1], CHOICES[:1])
    torch.testing.assert_close([s.logprob for s in fused], [s.logprob for s in receiver], atol=1e-4, rtol=0)


def test_bad_queries() -> None:
    by_name = answerers()
    with pytest.raises(ValueError, match="at least one token"):
        by_name["receiver"].score(QUERIES[:1], [[""]])
    for name in ("receiver", "c2c", "fusion_off"):
        with pytest.raises(ValueError, match="is 256"):
            by_name[name].score([Query("ships " * 300)], [[" x"]])


def test_contexts_begin_the_last_user_message() -> None:
    asked, begun = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}
    assert prepend_text("Read this. ", "Why?") == "Read this. Why?"
    assert prepend_text("Read this. ", [asked, begun]) == [{"role": "user", "content": "Read this. Why?"}, begun]
    assert Query([asked, begun], continues=True, context="Ships.").with_context_in_prompt().prompt == [
        {"role": "user", "content": "Ships.\n\nWhy?"},
        begun,
    ]
    assert Query("Why?").with_context_in_prompt().prompt == "Why?" and asked["content"] == "Why?"
