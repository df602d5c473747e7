"""Processor and model together: several sharers with tokenizers of their own, against the naive fuser."""

import pytest
import torch
from conftest import randomize_fuser, tiny_model
from naive import naive_greedy, naive_prefill
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CCache, C2CForCausalLM, C2CProcessor
from c2c_hf._compat import CACHE_ARGUMENT

TEXTS = ["The sharer reads the text, the receiver answers.", "河流流入大海 🌊", "def f(x):\n\treturn x", "Why?"]


def pair(token_alignment: str | list[str]) -> tuple[C2CForCausalLM, C2CProcessor]:
    """A byte-level receiver, a metaspace sharer with BOS and a byte-level sharer of another vocabulary."""
    tokenizers = [byte_level_tokenizer(), metaspace_tokenizer(), byte_level_tokenizer(vocab_size=330)]
    models = [
        tiny_model(name, seed, len(tokenizer))
        for seed, (name, tokenizer) in enumerate(zip(("llama", "gemma3", "qwen3"), tokenizers, strict=True))
    ]
    model = C2CForCausalLM.from_receiver_and_sharers(
        models[0], models[1:], token_alignment="span", fuser_hidden_size=16, fuser_intermediate_size=16
    )
    if token_alignment != "span":
        config = model.config
        config.override({"token_alignment": token_alignment})
        model = C2CForCausalLM(config, models[0], models[1:]).eval()
        for index, alignment in enumerate(config.token_alignments):
            if alignment != "span":
                model.set_token_table(index, tokenizers[0], tokenizers[index + 1])
    return randomize_fuser(model, 9), C2CProcessor(tokenizers[0], tokenizers[1:], token_alignment=token_alignment)


def rows_alone(inputs, row: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """One row without padding: the receiver's ids, every sharer's, and the alignments between them."""
    real = inputs["attention_mask"][row].bool()
    sharer_ids, alignments = [], []
    for ids, mask, alignment in zip(
        inputs["sharer_input_ids"], inputs["sharer_attention_mask"], inputs["sharer_alignment"], strict=True
    ):
        seen = mask[row].bool()
        new_position = seen.long().cumsum(0) - 1
        own = alignment[row][real]
        sharer_ids.append(ids[row][seen])
        alignments.append(torch.where(own >= 0, new_position[own.clamp_min(0)], -1))
    return inputs["input_ids"][row][real], sharer_ids, alignments


@pytest.mark.parametrize("token_alignment", ["span", "first", ["span", "longest"]], ids=str)
def test_equals_naive_fusion(token_alignment: str | list[str]) -> None:
    model, processor = pair(token_alignment)
    inputs = processor(TEXTS)
    logits = model(**inputs).logits
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    aligned = 0
    for row in range(len(TEXTS)):
        ids, sharer_ids, alignments = rows_alone(inputs, row)
        aligned += sum(int((alignment >= 0).sum()) for alignment in alignments)
        expected, _ = naive_prefill(model, ids, sharer_ids, alignments)
        torch.testing.assert_close(logits[row, -len(ids) :], expected, atol=1e-4, rtol=0)
        answer = out[row, inputs["input_ids"].shape[1] :]
        assert torch.equal(answer, naive_greedy(model, ids, sharer_ids, alignments, 8))
    assert aligned > 60


def test_tables_need_no_processor() -> None:
    """With a lookup table the model makes the sharers' tokens itself, the same as the processor."""
    model, processor = pair("first")
    inputs = processor(TEXTS)
    alone = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(**alone).logits[:, -1], model(**inputs).logits[:, -1], atol=1e-4, rtol=0)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**alone, **kwargs), model.generate(**inputs, **kwargs))


def test_a_context_that_only_sharers_read() -> None:
    """The receiver's tokens stay the same, its answer changes; an empty context changes nothing."""
    model, processor = pair("span")
    plain = processor(TEXTS)
    told = processor(TEXTS, sharer_context="The river is the Elbe.")
    untold = processor(TEXTS, sharer_context="")
    assert torch.equal(plain["input_ids"], told["input_ids"])
    logits = [model(**inputs).logits[:, -1] for inputs in (plain, told, untold)]
    assert (logits[0] - logits[1]).abs().amax(1).min() > 1e-3
    assert torch.equal(logits[0], logits[2])
    with model.disable_fusion():
        assert torch.equal(model(**plain).logits, model(**told).logits)


def test_conversation_on_a_kept_cache() -> None:
    """Chat turns through the processor; an answer that the caller replaces leaves the rest of the cache."""
    model, processor = pair("span")
    messages = [{"role": "user", "content": "Where do rivers end?"}]
    cache, words = C2CCache(), processor.tokenizer(" ships keeper", add_special_tokens=False)["input_ids"]
    # Words that are tokenized as they are generated.
    options = {"max_new_tokens": 4, "do_sample": False, "prefix_allowed_tokens_fn": lambda row, ids: words}
    for question in ("In the sea?", "And then?"):
        inputs = processor.apply_chat_template(messages)
        before = cache.get_seq_length()
        out = model.generate(**inputs, **options, **{CACHE_ARGUMENT: cache})
        assert cache.get_seq_length() == out.shape[1] - 1 > before
        answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    messages[1] = {"role": "assistant", "content": "Another answer"}
    inputs = processor.apply_chat_template(messages)
    out = model.generate(**inputs, **options, **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == out.shape[1] - 1 and torch.equal(cache.input_ids, out[:, :-1])
    assert [state.input_ids.shape[1] > 20 for state in cache.sharer_caches] == [True, True]
