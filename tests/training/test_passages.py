"""Rows on passages: continuations of a sharer-only context, several questions on one, and texts kept apart."""

import logging
import random

import pytest
from datasets import Dataset, IterableDataset
from tokenizers_for_tests import TEXT, TURN_TEMPLATE, byte_level_tokenizer, metaspace_tokenizer
from training_for_tests import PROCESSOR

from c2c_hf import C2CDataCollator, C2CProcessor
from c2c_hf.training.dataset import prepare_dataset
from c2c_hf.training.passages import exclude_overlaps, passage_chats, rows_word_runs, word_question, word_runs

SQUAD = [
    {"context": TEXT[0], "question": "How many {ships}?", "answers": {"text": ["forty-seven", "47"], "start": [1, 2]}},
    {"context": TEXT[1], "question": "What is the capital?", "answers": {"text": ["Paris"], "start": [1]}},
    {"context": TEXT[0], "question": "Who counted?", "answers": {"text": ["the keeper"], "start": [4]}},
    {"context": TEXT[0], "question": "Whom did he greet?", "answers": {"text": ["the ships"], "start": [4]}},
    {"context": TEXT[0], "question": "Unanswerable?", "answers": {"text": [], "start": []}},
]


def memory_processor(sharers: int = 1, **fields: object) -> C2CProcessor:
    others = [metaspace_tokenizer(chat_template=TURN_TEMPLATE), byte_level_tokenizer(350, chat_template=None)]
    return C2CProcessor(byte_level_tokenizer(), others[:sharers], mode="memory", **fields)


@pytest.mark.parametrize("sharers", [1, 2])
@pytest.mark.parametrize("plain_text", [False, True])
def test_continuation_rows(sharers: int, plain_text: bool) -> None:
    """Slots for all before the cut but one token, which is computed; targets behind it; the sharers see no target."""
    processor = memory_processor(sharers)
    lengths = {"continuation_length": 6, "min_prefix_length": 5, "max_prefix_length": 12}
    rows = Dataset.from_list([{"text": text} for text in [*TEXT, "short"]])
    examples = list(prepare_dataset(rows, processor, plain_text=plain_text, **lengths))
    assert len(examples) == len(TEXT), "a short text is left out"
    head = [] if plain_text else processor.tokenizer("<|im_start|>user\n")["input_ids"]
    cuts = set()
    for example, text in zip(examples, TEXT, strict=True):
        ids = processor.tokenizer(text)["input_ids"]
        own = example["input_ids"]
        slots = {i for row in example["sharer_alignment"] for i, slot in enumerate(row) if slot >= 0}
        # The last sharer's context is the one that goes on.
        cut = max(slots) + 2 - min(i for i, slot in enumerate(example["sharer_alignment"][-1]) if slot >= 0)
        cut += int(plain_text and sharers == 1)  # the first token is the attention sink
        assert example["is_continuation"] and all(example["is_target"])
        assert own[: len(head)] == head and own[-cut:] == ids[:cut]
        assert example["answer_ids"] == ids[cut : cut + 6]
        assert 5 <= cut <= 12 and len(own) - 1 not in slots
        assert slots == set(range(max(len(head), 1), len(own) - 1))
        assert example["length"] == len(own) + len(example["answer_ids"])
        for tokenizer, sharer_ids in zip(processor.sharer_tokenizers, example["sharer_input_ids"], strict=True):
            decoded = tokenizer.decode(sharer_ids, skip_special_tokens=True)
            before = processor.tokenizer.decode(ids[:cut])
            assert decoded.strip() == before.strip() or before not in text, "byte tokens of one character"
        cuts.add(cut)
    assert len(cuts) > 1
    again, other = (
        prepare_dataset(rows, processor, plain_text=plain_text, seed=seed, **lengths)["input_ids"] for seed in (42, 1)
    )
    assert again == [example["input_ids"] for example in examples] != other


def test_continuations_need_the_receivers_grid() -> None:
    rows = Dataset.from_list([{"text": TEXT[0]}])
    for processor in (PROCESSOR, memory_processor(memory_grid="sharer")):
        with pytest.raises(
            ValueError, match="a `text` row, which continues its context, needs memory mode on the rec"
        ):
            prepare_dataset(rows, processor)


def test_questions_on_one_passage_are_turns_of_a_chat() -> None:
    processor = memory_processor()
    chats = passage_chats(Dataset.from_list(SQUAD), "squad", seed=3)
    assert len(chats) < 4
    answers = [message["content"] for chat in chats for message in chat["messages"] if message["role"] == "assistant"]
    assert sorted(answers) == ["Paris", "forty-seven", "the keeper", "the ships"], "of several answers the first"
    examples = list(prepare_dataset(Dataset.from_list(SQUAD), processor, seed=3))
    assert len(examples) == len(chats)
    for example, chat in zip(examples, chats, strict=True):
        whole = processor.apply_chat_template(
            chat["messages"],
            sharer_context=chat["sharer_context"],
            return_tensors=None,
            add_generation_prompt=False,
        )
        ids = example["input_ids"] + example["answer_ids"]
        assert ids == whole["input_ids"][: len(ids)], "as generation tokenizes it"
        assert processor.tokenizer.decode(whole["input_ids"][len(ids) :]).strip() == ""
        labels = C2CDataCollator(processor)([example])["labels"][0]
        expected = "".join(f"{message['content']}<|im_end|>" for message in chat["messages"][1::2])
        assert processor.tokenizer.decode(labels[labels != -100]) == expected
    assert any(not all(example["is_target"]) for example in examples), "some chat has several turns"
    cut = prepare_dataset(Dataset.from_list(SQUAD), processor, max_length=len(examples[0]["input_ids"]) + 3, seed=3)
    assert len(cut[0]["answer_ids"]) == len(cut[0]["is_target"]) == 3


def test_a_template_that_changes_earlier_turns_has_one_example_per_turn() -> None:
    changing = (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ m['role'] + ':' + m['content'] + ';' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    processor = C2CProcessor(byte_level_tokenizer(chat_template=changing), metaspace_tokenizer(), mode="memory")
    turns = [("user", "hello"), ("assistant", "ships"), ("user", "Paris"), ("assistant", "autumn")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "sharer_context": TEXT[0]}
    examples = prepare_dataset(Dataset.from_list([row]), processor)
    assert len(examples) == 2
    assert processor.tokenizer.decode(examples[1]["answer_ids"]).startswith("autumn")


def test_questions_are_worded() -> None:
    generator = random.Random(0)
    short = {word_question("Who {is} it?", "the keeper", generator) for _ in range(200)}
    long = {word_question("Who {is} it?", "one two three four five six seven", generator) for _ in range(200)}
    assert "Who {is} it?" in long and "Question: Who {is} it?" in long
    assert any("few words" in question for question in short) and not any("few words" in question for question in long)


def test_bad_rows_of_passages() -> None:
    for row, message in (
        ({**SQUAD[0], "context": " "}, "Row 1 of it: `context` must be a text that is not empty"),
        ({**SQUAD[0], "answers": "Paris"}, "Row 1 of it: `answers` must be a list of texts"),
        ({**SQUAD[0], "answers": {"text": [""]}}, "it has no question with an answer"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_dataset(Dataset.from_list([row]), memory_processor(), name="it")
    with pytest.raises(ValueError, match="cannot be streamed"):
        prepare_dataset(IterableDataset.from_generator(lambda: iter(SQUAD)), memory_processor())


def test_rows_that_share_text_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    words = [f"w{i}" for i in range(60)]
    assert len(word_runs(" ".join(words))) == 41 and not word_runs(" ".join(words[:19]))
    runs = rows_word_runs([{"context": " ".join(words[:30])}, {"text": "x"}])
    rows = [
        {"sharer_context": "W10, " + "; ".join(words[11:30]), "messages": []},
        {"sharer_context": " ".join(words[11:40]), "messages": []},
        {"sharer_context": "", "messages": [{"role": "user", "content": "so: " + " ".join(words[:20])}]},
    ]
    with caplog.at_level(logging.WARNING):
        kept = exclude_overlaps(Dataset.from_list(rows), runs, "these")
    assert kept["sharer_context"] == [rows[1]["sharer_context"]]
    assert "Left out 2 of 3 rows of these" in caplog.text
    streamed = exclude_overlaps(Dataset.from_list(rows).to_iterable_dataset(), runs)
    assert [row["sharer_context"] for row in streamed] == [rows[1]["sharer_context"]]
