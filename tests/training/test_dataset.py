"""Rows of every kind become examples, examples become batches, and bad rows are named."""

import gzip
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from training_for_tests import CHATS, PROCESSOR, chat_rows, make_processor, write_rows

from c2c_hf import C2CDataCollator, C2CProcessor, C2CTrainingArguments
from c2c_hf.training.dataset import load_rows, prepare_dataset
from c2c_hf.training.recipe import DataArguments

CHOICES = {"id": "q1", "question": "Which {is} blue?", "choices": ["the sky", "grass"], "answer": 1}


def texts(example: dict, processor: C2CProcessor = PROCESSOR) -> tuple[str, str]:
    decode = processor.tokenizer.decode
    return decode(example["input_ids"]), decode(example["answer_ids"])


def test_every_assistant_turn_is_an_example() -> None:
    examples = prepare_dataset(chat_rows(), PROCESSOR)
    start, end = "<|im_start|>", "<|im_end|>"
    first = f"{start}user\nWhat is the capital of France?{end}\n{start}assistant\n"
    assert len(examples) == 4
    assert texts(examples[0]) == (first, f"Paris.{end}")
    assert texts(examples[1]) == (
        f"{first}Paris.{end}\n{start}user\nIs the keeper at the café?{end}\n{start}assistant\n",
        f"No, the keeper counted ships.{end}",
    )
    assert texts(examples[2])[1] == f"蓝{end}"
    assert examples["length"] == [len(e["input_ids"]) + len(e["answer_ids"]) for e in examples]


def test_prompts_are_those_of_the_processor() -> None:
    """Training and generation tokenize a prompt alike."""
    processor = make_processor(sharers=2)
    batch = C2CDataCollator(processor)(list(prepare_dataset(chat_rows([chat[:2] for chat in CHATS[::2]]), processor)))
    expected = processor.apply_chat_template([chat[:1] for chat in CHATS[::2]], padding=True)
    length = expected["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name][:, :length], expected[name])
    for index in range(2):
        assert torch.equal(batch["sharer_input_ids"][index], expected["sharer_input_ids"][index])
        assert torch.equal(batch["sharer_attention_mask"][index], expected["sharer_attention_mask"][index])
        assert torch.equal(batch["sharer_alignment"][index][:, :length], expected["sharer_alignment"][index])
        assert (batch["sharer_alignment"][index][:, length:] == -1).all()


@pytest.mark.parametrize("sharers", [1, 2])
def test_batch_equals_single_rows(sharers: int) -> None:
    """Row by row and position by position, without padding."""
    processor = make_processor(sharers=sharers)
    examples = list(prepare_dataset(chat_rows(), processor))
    batch = C2CDataCollator(processor)(examples)
    longest = max(len(e["answer_ids"]) for e in examples)
    boundary = max(len(e["input_ids"]) for e in examples)
    assert batch["logits_to_keep"] == longest + 1
    assert batch["input_ids"].shape == (4, boundary + longest)
    for row, example in enumerate(examples):
        prompt, answer = example["input_ids"], example["answer_ids"]
        real = batch["attention_mask"][row].nonzero().flatten().tolist()
        assert real == list(range(boundary - len(prompt), boundary + len(answer)))
        assert batch["input_ids"][row, real].tolist() == prompt + answer
        labels = batch["labels"][row]
        assert labels[boundary : boundary + len(answer)].tolist() == answer
        assert (labels != -100).sum() == len(answer)
        for index in range(sharers):
            ids, mask, alignment = (
                batch[name] if sharers == 1 else batch[name][index]
                for name in ("sharer_input_ids", "sharer_attention_mask", "sharer_alignment")
            )
            assert ids[row][mask[row].bool()].tolist() == example["sharer_input_ids"][index]
            aligned = [ids[row, a].item() if a >= 0 else None for a in alignment[row].tolist()]
            own = example["sharer_input_ids"][index]
            expected = [own[a] if a >= 0 else None for a in example["sharer_alignment"][index]]
            assert [aligned[position] for position in real] == expected + [None] * len(answer)
            assert sum(a is not None for a in aligned) == sum(e is not None for e in expected) > 0


@pytest.mark.parametrize(
    ("answer_format", "answer"), [("letter", "B"), ("text", "grass"), ("both", "B. grass")], ids=str
)
@pytest.mark.parametrize("template", [True, False], ids=["chat", "plain"])
def test_multiple_choice(answer_format: str, answer: str, template: bool) -> None:
    processor = make_processor(template)
    (example,) = prepare_dataset(Dataset.from_list([CHOICES]), processor, answer_format=answer_format)
    question = "Which {is} blue?\nA. the sky\nB. grass\nAnswer:"
    if template:
        expected = (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>")
    else:
        expected = (question, f" {answer}<|im_end|>")
    assert texts(example, processor) == expected


def test_prompt_and_completion() -> None:
    rows = Dataset.from_list([{"prompt": "The capital of France is", "completion": " Paris."}])
    (example,) = prepare_dataset(rows, PROCESSOR, plain_text=True)
    assert texts(example) == ("The capital of France is", " Paris.<|im_end|>")
    (example,) = prepare_dataset(rows, PROCESSOR)
    assert texts(example)[0].startswith("<|im_start|>user\nThe capital")


def test_prompt_and_completion_of_messages() -> None:
    """As in TRL: only answers of the completion are learned."""
    (chat,) = (chat for chat in CHATS if len(chat) == 4)
    rows = Dataset.from_list([{"prompt": chat[:3], "completion": chat[3:]}])
    (example,) = prepare_dataset(rows, PROCESSOR)
    assert texts(example) == texts(prepare_dataset(chat_rows([chat]), PROCESSOR)[1])


def test_examples_are_returned_as_they_are() -> None:
    examples = prepare_dataset(chat_rows(), PROCESSOR)
    assert prepare_dataset(examples, PROCESSOR) is examples
    streamed = prepare_dataset(chat_rows().to_iterable_dataset(), PROCESSOR)
    assert list(prepare_dataset(streamed, PROCESSOR)) == list(examples)


def test_plain_chats() -> None:
    processor = make_processor(receiver_template=False)
    example = prepare_dataset(chat_rows(), processor)[1]
    assert texts(example, processor) == (
        "What is the capital of France?\nParis.\nIs the keeper at the café?\n",
        "No, the keeper counted ships.<|im_end|>",
    )


def test_conversations_of_openhermes() -> None:
    turns = [{"from": "human", "value": "What is the capital of France?"}, {"from": "gpt", "value": "Paris."}]
    rows = Dataset.from_list([{"conversations": turns}])
    assert texts(prepare_dataset(rows, PROCESSOR)[0]) == texts(prepare_dataset(chat_rows(), PROCESSOR)[0])


def test_sharer_context() -> None:
    rows = Dataset.from_list(
        [{"prompt": "Where is it?", "completion": "Here", "sharer_context": "The keeper said hello."}]
    )
    (example,) = prepare_dataset(rows, PROCESSOR)
    assert "keeper" in PROCESSOR.sharer_tokenizers[0].decode(example["sharer_input_ids"][0])
    assert "keeper" not in texts(example)[0]


def test_long_prompts_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        examples = prepare_dataset(chat_rows(), PROCESSOR, max_length=40, name="chats.jsonl")
    assert "Dropped 1 of 4 examples of chats.jsonl" in caplog.text
    assert len(examples) == 3
    assert max(examples["length"]) == 40, "the long answer is cut"
    with pytest.raises(ValueError, match="no example to use"):
        prepare_dataset(chat_rows(), PROCESSOR, max_length=4)


def test_streaming_equals_map(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "chats.jsonl.gz", [{"messages": chat} for chat in CHATS])
    mapped = prepare_dataset(load_rows(path), PROCESSOR, max_length=40)
    streamed = prepare_dataset(load_rows(path, streaming=True), PROCESSOR, max_length=40)
    assert isinstance(streamed, IterableDataset)
    assert isinstance(streamed, torch.utils.data.IterableDataset)
    caplog.clear()
    assert list(streamed) == list(mapped)
    assert "Row 1 of the data set is dropped, in whole or in part" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_several_files_are_joined(tmp_path: Path, streaming: bool) -> None:
    files = [
        write_rows(tmp_path / "chats.jsonl", [{"id": str(i), "messages": chat} for i, chat in enumerate(CHATS)]),
        write_rows(tmp_path / "choices.jsonl.gz", [CHOICES] * 3),
    ]
    arguments = DataArguments(files, eval_data=files[1:], max_train_rows=2, streaming=streaming)
    train, evaluation = arguments.load(PROCESSOR, C2CTrainingArguments(max_length=128, use_cpu=True))
    assert sorted(texts(e)[1] for e in train)[0] == "B<|im_end|>"
    assert len(list(train)) == 3 + 2, "two chats with three answers, two questions"
    assert evaluation is not None and len(evaluation) == 3


BAD_ROWS = {
    "empty conversation": ({"messages": []}, "Row 2 .*`messages` is empty"),
    "no assistant turn": ({"messages": CHATS[0][:1]}, "Row 2 .*no assistant turn"),
    "assistant first": ({"messages": CHATS[0][1:2]}, "Row 2 .*no assistant turn"),
    "empty answer": ({"messages": [CHATS[0][0], {"role": "assistant", "content": ""}]}, "Row 2 .*no assistant turn"),
    "no role": ({"messages": [{"role": None, "content": "hello"}]}, "Row 2 .*message 1 .*no `role`"),
    "answer out of range": ({**CHOICES, "id": "q2", "answer": 2}, r"Row 2 \(id 'q2'\) .*`answer` .*0 to 1.*got 2"),
    "one choice": ({**CHOICES, "choices": ["x"], "answer": 0}, "Row 2 .*`choices` .*2 to 26"),
    "no question": ({**CHOICES, "question": " "}, "Row 2 .*`question`"),
    "no completion": ({"prompt": "hello", "completion": None}, "Row 2 .*`completion`"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case: str, streaming: bool) -> None:
    row, message = BAD_ROWS[case]
    good = next(
        good
        for good in ({"messages": CHATS[0]}, CHOICES, {"prompt": "hello", "completion": "ships"})
        if good.keys() == row.keys()
    )
    rows: Dataset | IterableDataset = Dataset.from_list([good, row, good])
    if streaming:
        rows = rows.to_iterable_dataset()
    with pytest.raises(ValueError, match=message):
        list(prepare_dataset(rows, PROCESSOR, name="rows.jsonl"))


def test_wrong_columns() -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl has the columns \['body'\], but needs `messages`"):
        prepare_dataset(Dataset.from_list([{"body": "hello"}]), PROCESSOR, name="rows.jsonl")


@pytest.mark.parametrize("compressed", [False, True])
def test_files_that_are_not_utf8(tmp_path: Path, compressed: bool) -> None:
    data = '{"prompt": "a", "completion": "b"}\n{"prompt": "é", "completion": "b"}\n'.encode("latin-1")
    path = tmp_path / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    path.write_bytes(gzip.compress(data) if compressed else data)
    with pytest.raises(ValueError, match=r"Row 2 of .*rows\.jsonl.* is not UTF-8 \(byte 0xe9\)"):
        load_rows(str(path))


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"Row 2 of .* is no JSON object"):
        load_rows(str(path))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 99)[:-12])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is damaged"):
        load_rows(str(packed))
    with pytest.raises(ValueError, match=r"'missing\.jsonl' does not exist"):
        load_rows("missing.jsonl")


def test_arguments_check_themselves() -> None:
    with pytest.raises(ValueError, match="`max_train_rows` must be at least 1, but got 0"):
        DataArguments(max_train_rows=0)
    with pytest.raises(ValueError, match="`train_data` must name"):
        DataArguments().load(PROCESSOR, C2CTrainingArguments(use_cpu=True))
