"""The slots that the processor makes, on both grids, and what the model computes with them."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from fitting_for_tests import memory_pair
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.alignment.spans import align_slots
from c2c_hf.inference.inputs import ReceiverInputs
from c2c_hf.inference.memory_slots import slot_embeddings


def identity_pair(num_sharers: int = 1, **fields) -> tuple[C2CForCausalLM, C2CProcessor]:
    """Receiver and sharers are one model, whose states are taken as they are."""
    tokenizer = byte_level_tokenizer()
    base = tiny_model("llama", 0, len(tokenizer))
    fields = {"mode": "memory", "memory_source_layers": 1, **fields}
    model = C2CForCausalLM.from_receiver_and_sharers(base, [base] * num_sharers, **fields).eval()
    for fuser in model.fuser:
        for memory_map in fuser.maps:
            torch.nn.init.eye_(memory_map.out_proj.weight)
            torch.nn.init.zeros_(memory_map.out_proj.bias)
    return model, C2CProcessor.from_config(model.config, tokenizer, [tokenizer] * num_sharers)


@torch.no_grad()
def test_the_memory_of_oneself_is_prefilling() -> None:
    """On the receiver's grid `input_ids` is the prompt with its context: the same logits as without slots."""
    # Nothing is in front of the context on either side.
    model, processor = identity_pair(memory_sink_tokens=0)
    contexts = [TEXT[0], "", TEXT[1] * 3, "北京 🎉 café"]
    inputs = processor(["hello ships", "hello", "What is the capital?", "café"], sharer_context=contexts)
    expected = model.receiver(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, -1]
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits[:, -1], expected, rtol=0, atol=1e-4)
    slots = inputs["sharer_alignment"] >= 0
    assert slots.any(1).tolist() == [True, False, True, True]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    expected = model.receiver.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    for more in ({}, {"cache_implementation": "static"}):
        assert model.generate(**inputs, **options, **more).tolist() == expected.tolist()
    beams = {**options, "num_beams": 3}
    expected = model.receiver.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **beams)
    assert model.generate(**inputs, **beams).tolist() == expected.tolist()


@pytest.mark.parametrize("grid", ["receiver", "sharer"])
def test_batches_equal_single_rows(grid: str) -> None:
    """Rows of unequal contexts and prompts, with several sharers, equal single rows."""
    receiver, first, second = byte_level_tokenizer(), metaspace_tokenizer(), byte_level_tokenizer(vocab_size=330)
    models = [
        tiny_model(n, i, len(t))
        for i, (n, t) in enumerate(zip(("llama", "gemma3", "qwen3"), (receiver, first, second), strict=True))
    ]
    model = C2CForCausalLM.from_receiver_and_sharers(models[0], models[1:], mode="memory", memory_grid=grid)
    processor = C2CProcessor(receiver, [first, second], mode="memory", memory_grid=grid)
    prompts, contexts = ["hello ships", "What is the capital of France?", "café"], ["The keeper", "", "北京的天空很蓝"]
    batch = processor(prompts, sharer_context=contexts)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for inputs, make in (
        (batch, lambda row: processor(prompts[row], sharer_context=contexts[row])),
        (
            processor.apply_chat_template(chats, sharer_context=contexts),
            lambda row: processor.apply_chat_template(chats[row], sharer_context=contexts[row]),
        ),
    ):
        assert list(inputs) == processor.model_input_names
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=1).logits
        for row in range(3):
            single = make(row)
            with torch.no_grad():
                expected = model(**single, logits_to_keep=1).logits
            torch.testing.assert_close(logits[row], expected[0], rtol=0, atol=1e-4)
            slots = [(alignment >= 0)[0] for alignment in single["sharer_alignment"]]
            sharer_ids = [ids[0] for ids in single["sharer_input_ids"]]
            if not contexts[row]:
                assert not any(slot.any() for slot in slots)
                continue
            assert sharer_ids[0][0] == first.bos_token_id
            assert slots[1].nonzero()[0] == slots[0].nonzero()[-1] + 1, "one after the other"
            num_slots, text = [int(slot.sum()) for slot in slots], contexts[row] + "\n\n"
            if grid == "sharer":
                assert slots[0].nonzero()[0] == 1, "behind the receiver's sink"
                assert num_slots == [len(sharer_ids[0]) - 1, len(sharer_ids[1])]
            else:
                own = receiver(text, add_special_tokens=False)["input_ids"]
                assert num_slots[1] == len(own) and num_slots[0] == len(own)
                assert single["input_ids"][0][slots[1]].tolist() == own
    plain = receiver("café")["input_ids"]
    assert processor("café", return_tensors=None)["input_ids"] == plain
    is_prompt = torch.stack([alignment[0] < 0 for alignment in batch["sharer_alignment"]]).all(0)
    is_prompt &= batch["attention_mask"][0] == 1
    assert batch["input_ids"][0][is_prompt].tolist() == receiver("hello ships")["input_ids"]


def test_slots_are_the_same_in_front_of_every_question() -> None:
    """So that one prefilled context serves them all."""
    _, processor = memory_pair(same=False)
    found = []
    for question in ("hello", "ships?", "\n\nWhat", " and"):
        for make in (
            processor,
            lambda text, **kwargs: processor.apply_chat_template(
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}], **kwargs
            ),
        ):
            inputs = make(question, sharer_context=TEXT[0])
            slots = inputs["sharer_alignment"][0] >= 0
            found.append((inputs["input_ids"][0][slots].tolist(), inputs["sharer_input_ids"].tolist()))
    assert all(one == found[0] for one in found)


def test_the_first_tokens_are_never_slots() -> None:
    _, processor = memory_pair(same=False, sink=4)
    inputs = processor("hello ships, hello", sharer_context=TEXT[0])
    slots = inputs["sharer_alignment"][0] >= 0
    assert slots.nonzero()[0] == 4
    own = processor.tokenizer("hello ships, hello")["input_ids"]
    assert inputs["input_ids"][0][~slots].tolist() == own, "the prompt, with the slots behind its first tokens"
    # One token at least is behind them.
    inputs = processor.tokenizer("hello")["input_ids"], processor("hello", sharer_context=TEXT[0])
    slots = inputs[1]["sharer_alignment"][0] >= 0
    assert slots.nonzero()[0] == min(4, len(inputs[0]) - 1) and not slots[-1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncated_contexts(side: str) -> None:
    """Tokens of which the sharer has nothing are not in the prompt."""
    _, processor = memory_pair(same=False)
    processor.tokenizer.truncation_side = side
    text = " ".join(TEXT)
    inputs = processor("hello", sharer_context=text, truncation=True, max_length=24)
    slots = inputs["sharer_alignment"][0] >= 0
    assert inputs["sharer_input_ids"].shape[1] == 24 and 0 < int(slots.sum()) <= 24
    shown = processor.tokenizer.decode(inputs["input_ids"][0][slots])
    assert shown.strip() in text and (text.endswith(shown.strip()) if side == "left" else shown[5:10] in text[:40])


def test_alignment_of_slots() -> None:
    """The first sharer token that ends at or after the receiver's, and byte by byte within a character."""
    receiver = [(0, 3), (3, 4), (4, 9), (9, 10), (9, 10), (9, 10), (10, 12)]
    sharer = [(0, 0), (0, 4), (4, 6), (6, 9), (9, 10), (9, 10), (10, 14), (0, 0)]
    assert align_slots(receiver, sharer).tolist() == [1, 1, 3, 4, 4, 5, 6]
    assert align_slots(receiver, receiver).tolist() == list(range(len(receiver)))
    assert align_slots(receiver, []).tolist() == [-1] * len(receiver)
    # Cut by truncation.
    assert align_slots(receiver, [(4, 9)]).tolist() == [-1, -1, 0, -1, -1, -1, -1]
    assert align_slots([], sharer).dtype == np.int64


@torch.no_grad()
def test_embeddings_of_a_slot_and_of_the_tokens_before_it() -> None:
    """Left padding, and the first token of a text, have no token before them."""
    model, processor = identity_pair(memory_sink_tokens=0, memory_token_embeddings=2)
    batch = processor(["hello ships", "hello"], sharer_context=["ships", "What is the capital"])
    rows, columns = (batch["sharer_alignment"] >= 0).nonzero(as_tuple=True)
    table = model.get_input_embeddings()
    inputs = ReceiverInputs(batch["input_ids"], None, batch["attention_mask"], None)
    found = slot_embeddings(inputs, table, rows, columns, 3)
    size = table.weight.shape[1]
    for row, column, embeddings in zip(rows.tolist(), columns.tolist(), found, strict=True):
        for distance, part in enumerate(embeddings.split(size)):
            place = column - distance
            exists = place >= 0 and bool(batch["attention_mask"][row, place])
            expected = table.weight[batch["input_ids"][row, place]] if exists else torch.zeros(size)
            assert torch.equal(part, expected)
    assert found[:, size:].eq(0).all(1).any() and found[:, size : 2 * size].any(1).any()
    embedded = ReceiverInputs(None, table(batch["input_ids"]), batch["attention_mask"], None)
    assert torch.equal(slot_embeddings(embedded, table, rows, columns, 3), found)
