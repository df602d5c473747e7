"""Many questions on one kept `C2CCache`: each is answered as on an empty one, and what they share is computed once."""

from typing import Any

import pytest
import torch
from conftest import random_ids, tiny_c2c
from training_for_tests import make_model, make_processor
from transformers import StaticCache

from c2c_hf import C2CCache, C2CForCausalLM, C2CProcessor
from c2c_hf._compat import CACHE_ARGUMENT

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
DOCUMENTS = [
    "The keeper counted ships before breakfast.",
    "The keeper counted ships before breakfast at the café.",
    "Paris is the capital of France.",
]
QUESTIONS = ["Who counted?", "What is it, and where?", "Why?", "Who counted?"]


def build(mode: str) -> tuple[C2CForCausalLM, C2CProcessor]:
    torch.manual_seed(3)
    model = make_model(1, mode=mode, fuser_dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.fuser.named_parameters():
            if "gate_logit" in name:
                parameter.fill_(1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    own = make_processor()
    return model.eval(), C2CProcessor(own.tokenizer, own.sharer_tokenizers, "span", mode=mode)


PAIRS = {mode: build(mode) for mode in ("fusion", "memory")}


def ask(mode: str, question: str, document: str, cache: C2CCache | None = None) -> list[int]:
    model, processor = PAIRS[mode]
    inputs = processor.apply_chat_template([{"role": "user", "content": question}], sharer_context=document)
    kept = {} if cache is None else {CACHE_ARGUMENT: cache}
    return model.generate(**inputs, **GREEDY, **kept)[0, inputs["input_ids"].shape[1] :].tolist()


def chat(mode: str, question: str, document: str) -> dict[str, Any]:
    return PAIRS[mode][1].apply_chat_template([{"role": "user", "content": question}], sharer_context=document)


def filled(mode: str, by: str) -> C2CCache:
    """A cache that holds a first question about the first document, and perhaps its answer."""
    model, cache, inputs = PAIRS[mode][0], C2CCache(), chat(mode, "Where is it?", DOCUMENTS[0])
    if by == "forward":
        with torch.no_grad():
            model(**inputs, **{CACHE_ARGUMENT: cache})
    else:
        model.generate(**inputs, **GREEDY, num_beams=2 if by == "beams" else 1, **{CACHE_ARGUMENT: cache})
    if by == "beams":
        cache.batch_select_indices(torch.tensor([0]))
    assert cache.input_ids is not None and cache.input_ids.shape[1] == cache.get_seq_length()
    return cache


@pytest.mark.parametrize("by", ["forward", "generate", "beams"])
def test_questions_about_documents_on_one_cache(by: str) -> None:
    """Shorter and longer ones, the same again; another document, and one with the same beginning."""
    cache, answers = filled("memory", by), set()
    for document in DOCUMENTS:
        for question in QUESTIONS:
            found = ask("memory", question, document, cache)
            assert found == ask("memory", question, document)
            answers.add(tuple(found))
    assert len(answers) > 3


@pytest.mark.parametrize("by", ["forward", "generate", "beams"])
@pytest.mark.parametrize("document", DOCUMENTS[::2])
@torch.no_grad()
def test_a_second_question_with_fusion(by: str, document: str) -> None:
    """It continues the common beginning, as a later turn does; that of another context is not common."""
    model, _ = PAIRS["fusion"]
    for question in QUESTIONS[:3]:
        cache, inputs, expected = filled("fusion", by), chat("fusion", question, document), C2CCache()
        width = min(cache.get_seq_length(), inputs["input_ids"].shape[1])
        same = inputs["input_ids"][0, :width] == cache.input_ids[0, :width]
        if document != DOCUMENTS[0]:
            same &= inputs["sharer_alignment"][0, :width] < 0
        num_same = int(same.long().cumprod(0).sum())
        if num_same > 0:
            beginning = {name: inputs[name][:, :num_same] for name in ("input_ids", "sharer_alignment")}
            model(**{**inputs, **beginning, "attention_mask": None}, **{CACHE_ARGUMENT: expected})
        assert ask("fusion", question, document, cache) == ask("fusion", question, document, expected)


def test_slots_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = PAIRS["memory"]
    cache, runs, slots = C2CCache(), [], []
    for models, calls in (([model.receiver.model, model.sharers[0].model], runs), ([model.fuser[0]], slots)):
        for module in models:
            monkeypatch.setattr(module, "forward", _counting(module.forward, calls))
    lengths = []
    for question in QUESTIONS:
        ask("memory", question, DOCUMENTS[0], cache)
        lengths.append((len(runs), len(slots)))
        runs.clear()
    assert [count for _, count in lengths] == [1] * 4, "the fuser runs for the first question only"
    # The question, and each answer token but the last.
    assert [count for count, _ in lengths[1:]] == [4] * 3
    ask("memory", QUESTIONS[0], DOCUMENTS[1], cache)
    assert len(slots) == 2


def _counting(forward: Any, calls: list[int]) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    return counted


@pytest.mark.parametrize("mode", PAIRS)
def test_fusion_goes_off_and_on_between_questions(mode: str) -> None:
    model, _ = PAIRS[mode]
    cache, question, document = C2CCache(), QUESTIONS[0], DOCUMENTS[0]
    fused = ask(mode, question, document)
    with model.disable_fusion():
        plain = ask(mode, question, document)
    assert fused != plain
    assert ask(mode, question, document, cache) == fused
    with model.disable_fusion():
        assert ask(mode, question, document, cache) == plain
        assert ask(mode, QUESTIONS[1], document, cache) == ask(mode, QUESTIONS[1], document)
    if mode == "memory":
        # Tokens that were cached without fusion are taken for a generated answer in fusion mode.
        assert ask(mode, question, document, cache) == fused


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("static", [False, True])
def test_prompts_with_response_fusion(name: str, static: bool) -> None:
    """Also where layers with a sliding window cannot be cropped, and a prompt with nothing in common."""
    model = tiny_c2c(name, ["qwen3"], fuse_response=True)
    start = random_ids(1, 7, seed=9)
    cache = C2CCache(StaticCache(config=model.receiver.config, max_cache_len=40) if static else None)
    for seed, length in enumerate((5, 2, 9, 1)):
        ids = torch.cat([start, random_ids(1, length, seed=seed)], 1)
        expected = model.generate(input_ids=ids, **GREEDY)
        assert torch.equal(model.generate(input_ids=ids, **GREEDY, **{CACHE_ARGUMENT: cache}), expected)
    other = random_ids(1, 6, seed=20)
    found = model.generate(input_ids=other, **GREEDY, **{CACHE_ARGUMENT: cache})
    assert torch.equal(found, model.generate(input_ids=other, **GREEDY))


def test_unknown_texts_and_other_batches_are_refused() -> None:
    model, cache = tiny_c2c(), C2CCache()
    ids = random_ids(1, 8)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, sharer_input_ids=ids, **{CACHE_ARGUMENT: cache})
    assert cache.input_ids is None
    with pytest.raises(ValueError, match="8 tokens of an unknown text, but `input_ids`, the whole text, has shape"):
        model.generate(input_ids=ids[:, :5], **GREEDY, **{CACHE_ARGUMENT: cache})
    cache = C2CCache()
    model.generate(input_ids=ids, **GREEDY, **{CACHE_ARGUMENT: cache})
    with pytest.raises(ValueError, match="of a text of 1 rows, but `input_ids`, the whole text, has shape"):
        model.generate(input_ids=ids.repeat(2, 1), **GREEDY, **{CACHE_ARGUMENT: cache})
