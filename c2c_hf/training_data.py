"""Training data: rows of chats, choices or completions -> tokenized examples -> batches with one boundary."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets

from .collation import SHARER_COLUMNS
from .processing_c2c import C2CProcessor
from .training_rows import load_rows

logger = logging.getLogger(__name__)

ANSWER_FORMATS = ("letter", "text", "both")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUESTION_TEMPLATE = "{question}\n{choices}\nAnswer:"
#: Names of roles in `conversations` rows (OpenHermes-2.5 and other ShareGPT data).
_ROLES = {"human": "user", "gpt": "assistant"}
_COLUMNS = ("input_ids", "answer_ids", *SHARER_COLUMNS, "length")

#: Messages in front of an answer, what stands between them in plain text, and the answer.
Turn = tuple[list[dict[str, Any]], str, str]


@dataclass
class DataArguments:
    """Which data `c2c train` reads.

    Args:
        train_data: JSON Lines files (`.jsonl`, `.jsonl.gz`) and Hub ids; several are joined.
        eval_data: The same for evaluation.
        dataset_config: Configuration name of the Hub data sets.
        train_split: Split of the Hub data sets to train on, slices such as `train[:1000]` included.
        eval_split: Split of the Hub data sets to evaluate on.
        max_train_rows: Use the first rows of each training data set only.
        max_eval_rows: The same for evaluation.
        streaming: Read training data on the fly; needs `max_steps`.
        shuffle_buffer_size: Number of streamed examples among which the next is drawn.
        preprocessing_num_workers: Processes that tokenize, without streaming.
        answer_format: Answer to a multiple choice question: `"letter"`, `"text"` of the choice, or `"both"`.
        question_template: Prompt of a multiple choice question, with `{question}` and `{choices}`.
        plain_text: Take prompts as plain text although the receiver has a chat template.
        chat_template_kwargs: Arguments of the chat templates, such as `{"enable_thinking": false}`.

    Raises:
        ValueError: For an unknown value, naming the field, the value and what is allowed.
    """

    train_data: list[str] = field(default_factory=list)
    eval_data: list[str] = field(default_factory=list)
    dataset_config: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    streaming: bool = False
    shuffle_buffer_size: int = 1000
    preprocessing_num_workers: int | None = None
    answer_format: str = "letter"
    question_template: str = QUESTION_TEMPLATE
    plain_text: bool = False
    chat_template_kwargs: dict | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        if self.answer_format not in ANSWER_FORMATS:
            raise ValueError(f"`answer_format` must be one of {list(ANSWER_FORMATS)}, but got {self.answer_format!r}.")
        for name in ("{question}", "{choices}"):
            if name not in self.question_template:
                raise ValueError(f"`question_template` must contain {name}, but got {self.question_template!r}.")
        for name in ("max_train_rows", "max_eval_rows", "shuffle_buffer_size", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value!r}.")

    def load(
        self, processor: C2CProcessor, max_length: int, seed: int = 42
    ) -> tuple[Dataset | IterableDataset, Dataset | None]:
        """Load and tokenize all data.

        Args:
            processor: The pair's.
            max_length: See [`prepare_dataset`].
            seed: Of the shuffling of streamed data.

        Returns:
            Training data, and evaluation data where there are any.

        Raises:
            ValueError: Nothing to train on, or bad data.
        """
        if not self.train_data:
            raise ValueError("`train_data` must name at least one file or Hub id, but is empty.")
        train = self._load(
            self.train_data, self.train_split, self.max_train_rows, self.streaming, processor, max_length
        )
        if isinstance(train, IterableDataset):
            train = train.shuffle(seed=seed, buffer_size=self.shuffle_buffer_size)
        if not self.eval_data:
            return train, None
        return train, self._load(self.eval_data, self.eval_split, self.max_eval_rows, False, processor, max_length)

    def _load(
        self,
        names: Sequence[str],
        split: str,
        max_rows: int | None,
        streaming: bool,
        processor: C2CProcessor,
        max_length: int,
    ) -> Any:
        prepared = []
        for name in names:
            rows = load_rows(name, split, self.dataset_config, streaming)
            if max_rows is not None:
                rows = rows.take(max_rows) if streaming else rows.select(range(min(max_rows, len(rows))))
            options: dict[str, Any] = {
                "answer_format": self.answer_format,
                "question_template": self.question_template,
                "plain_text": self.plain_text,
                "chat_template_kwargs": self.chat_template_kwargs,
                "num_proc": self.preprocessing_num_workers,
            }
            prepared.append(prepare_dataset(rows, processor, max_length, name=name, **options))
        return concatenate_datasets(prepared) if len(prepared) > 1 else prepared[0]


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    processor: C2CProcessor,
    max_length: int = 2048,
    answer_format: str = "letter",
    question_template: str = QUESTION_TEMPLATE,
    plain_text: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    name: str = "the data set",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize a data set for [`C2CDataCollator`], one example per assistant turn.

    Args:
        dataset: Rows of `messages` (or `conversations`), of `question`, `choices` and `answer`, or of `prompt` and
            `completion`. A text in `sharer_context` is read by the sharers only.
        processor: The pair's.
        max_length: Largest number of receiver tokens, and of each sharer's. Answers are cut there; examples whose
            prompt leaves no room for an answer are dropped, and their number is logged (of streamed data: each).
        answer_format: See [`DataArguments`], as the next three.
        question_template: Prompt of a multiple choice question.
        plain_text: Use no chat template.
        chat_template_kwargs: Arguments of the chat templates.
        name: What errors call the data set.
        num_proc: Processes that tokenize; for streamed data none.

    Returns:
        Examples of `input_ids` (the prompt), `answer_ids`, `sharer_input_ids`, `sharer_attention_mask` and
        `sharer_alignment` (each one list per sharer) and `length`.

    Raises:
        ValueError: Unknown columns, or a bad row, named. For streamed data the latter comes on iteration.
    """
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset), {}))
    _check_columns(columns, name)
    # Built once, before processes share the work and before the cache is asked for the result.
    _ = processor.token_tables
    make = ExampleMaker(
        processor, max_length, answer_format, question_template, plain_text, chat_template_kwargs or {}, name
    )
    arguments: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns}
    if isinstance(dataset, IterableDataset):
        make.log_dropped = True
        examples = dataset.map(make, batch_size=8, **arguments)
        return examples.filter(lambda fits: fits, input_columns="fits").remove_columns("fits")
    examples = dataset.map(make, batch_size=200, num_proc=num_proc, desc=f"Tokenizing {name}", **arguments)
    kept = examples.filter(lambda fits: fits, input_columns="fits").remove_columns("fits")
    if dropped := len(examples) - len(kept):
        logger.warning(
            "Dropped %d of %d examples of %s, whose prompts leave no room for an answer in `max_length=%d` tokens.",
            dropped,
            len(examples),
            name,
            max_length,
        )
    if not len(kept):
        raise ValueError(f"{name} leaves no example to use: it is empty, or `max_length={max_length}` is too small.")
    return kept


def _check_columns(columns: Sequence[str], name: str) -> None:
    known = ({"messages"}, {"conversations"}, {"question", "choices", "answer"}, {"prompt", "completion"})
    if not any(names <= set(columns) for names in known):
        raise ValueError(
            f"{name} has the columns {sorted(columns)}, but needs `messages` (chats), `question`, `choices` and "
            "`answer` (multiple choice), or `prompt` and `completion`; rename its columns."
        )


@dataclass
class ExampleMaker:
    """Turns rows into tokenized examples; a function that `datasets` can hash and send to other processes."""

    processor: C2CProcessor
    max_length: int
    answer_format: str
    question_template: str
    plain_text: bool
    chat_template_kwargs: dict[str, Any]
    name: str
    log_dropped: bool = False

    def __call__(self, rows: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Tokenize a batch of rows.

        Raises:
            ValueError: A row is bad; the message names it.
        """
        examples: list[dict[str, Any]] = []
        for position, index in enumerate(indices):
            row = {column: values[position] for column, values in rows.items()}
            try:
                turns = list(self.turns(row))
                made = [self.tokenize(turn, row.get("sharer_context") or None) for turn in turns]
            except ValueError as error:
                known_as = f" (id {row['id']!r})" if row.get("id") is not None else ""
                raise ValueError(f"Row {index + 1}{known_as} of {self.name}: {error}") from error
            examples += made
            if self.log_dropped and not all(example["fits"] for example in made):
                logger.warning(
                    "Row %d of %s is dropped, in whole or in part: a prompt leaves no room in `max_length=%d` tokens.",
                    index + 1,
                    self.name,
                    self.max_length,
                )
        return {column: [example[column] for example in examples] for column in (*_COLUMNS, "fits")}

    def turns(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        """Split a row into prompts and answers."""
        if "messages" in row or "conversations" in row:
            yield from _chat_turns(row)
        elif "choices" in row:
            yield self._choice_turn(row)
        else:
            for column in ("prompt", "completion"):
                if not isinstance(row[column], str) or not row[column].strip():
                    raise ValueError(f"`{column}` must be a text that is not empty, but got {row[column]!r:.80}.")
            yield [{"role": "user", "content": row["prompt"]}], "", row["completion"]

    def _choice_turn(self, row: Mapping[str, Any]) -> Turn:
        question, choices, answer = row["question"], row["choices"], row["answer"]
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`question` must be a text that is not empty, but got {question!r:.80}.")
        texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
        if not texts or not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"`choices` must be a list of 2 to {len(LETTERS)} texts, but got {choices!r:.80}.")
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"`answer` must be an index from 0 to {len(choices) - 1}, but got {answer!r}.")
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        # Plain replacement: a question may contain braces.
        prompt = self.question_template.replace("{choices}", "\n".join(lines)).replace("{question}", question)
        answers = {"letter": LETTERS[answer], "text": choices[answer], "both": lines[answer]}
        return [{"role": "user", "content": prompt}], " ", answers[self.answer_format]

    def tokenize(self, turn: Turn, context: str | None) -> dict[str, Any]:
        """Tokenize one prompt for all models and its answer for the receiver.

        The answer of a chat ends as the receiver's template ends a turn, any other with its end token.
        """
        messages, between, answer = turn
        processor, tokenizer = self.processor, self.processor.tokenizer
        end = tokenizer.eos_token or ""
        if self.plain_text or processor.chat_template is None:
            prompt, special = "\n".join(str(message["content"] or "") for message in messages), True
            if between == "\n":
                prompt, between = prompt + between, ""
            inputs = processor(prompt, sharer_context=context, return_tensors=None)
            answer = between + answer + end
        else:
            options: dict[str, Any] = {**self.chat_template_kwargs, "add_generation_prompt": True}
            inputs = processor.apply_chat_template(messages, sharer_context=context, return_tensors=None, **options)
            prompt, special = str(processor.apply_chat_template(messages, tokenize=False, **options)), False
            options["add_generation_prompt"] = False
            chat = [*messages, {"role": "assistant", "content": answer}]
            whole = str(processor.apply_chat_template(chat, tokenize=False, **options))
            # What a template writes behind the end of a turn is no part of the answer.
            answer = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else answer + end
        ids = inputs["input_ids"]
        together = tokenizer(prompt + answer, add_special_tokens=special)["input_ids"]
        # A token across the boundary could never be generated.
        split = together[: len(ids)] != ids
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] if split else together[len(ids) :]
        if not answer_ids:
            raise ValueError("the answer has no tokens.")
        several = len(processor.sharer_tokenizers) > 1
        sharers = {name: inputs[name] if several else [inputs[name]] for name in _COLUMNS[2:5]}
        longest = max(len(ids) + 1, *(len(sharer_ids) for sharer_ids in sharers["sharer_input_ids"]))
        answer_ids = answer_ids[: max(1, self.max_length - len(ids))]
        return {
            "input_ids": ids,
            "answer_ids": answer_ids,
            **sharers,
            "length": len(ids) + len(answer_ids),
            "fits": longest <= self.max_length,
        }


def _chat_turns(row: Mapping[str, Any]) -> Iterator[Turn]:
    column = "messages" if "messages" in row else "conversations"
    messages = row[column]
    if not messages:
        raise ValueError(f"`{column}` is empty: a conversation needs a message and an answer to it.")
    if column == "conversations":
        messages = [
            {"role": _ROLES.get(message.get("from"), message.get("from")), "content": message.get("value")}
            for message in messages
        ]
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {index + 1} of `{column}` has no `role`, but is {message!r:.80}.")
    # Rows of one data set share their columns: those that a message lacks come as None.
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for message in chat:
        message.setdefault("content", "")
    answers = [i for i, message in enumerate(chat) if i > 0 and message["role"] == "assistant" and message["content"]]
    if not answers:
        raise ValueError(f"`{column}` has no assistant turn that answers something, so there is nothing to learn.")
    for index in answers:
        yield chat[:index], "\n", chat[index]["content"]
