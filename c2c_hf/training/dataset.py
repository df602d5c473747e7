"""Training data: rows of chats, choices or completions -> tokenized examples -> batches with one boundary."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets

from ..processing_c2c import C2CProcessor
from .examples import ExampleMaker
from .rows import load_rows

logger = logging.getLogger(__name__)

ANSWER_FORMATS = ("letter", "text", "both")
QUESTION_TEMPLATE = "{question}\n{choices}\nAnswer:"


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
        question_template: Prompt of a multiple choice question, with `{question}` and, unless the answer is a
            `"text"`, `{choices}`.
        plain_text: Take prompts as plain text although the receiver has a chat template.
        plain_choices: The same for multiple choice alone.
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
    plain_choices: bool = False
    chat_template_kwargs: dict | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        if self.answer_format not in ANSWER_FORMATS:
            raise ValueError(f"`answer_format` must be one of {list(ANSWER_FORMATS)}, but got {self.answer_format!r}.")
        for name in ("{question}", "{choices}") if self.answer_format != "text" else ("{question}",):
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
                "plain_choices": self.plain_choices,
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
    plain_choices: bool = False,
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
        answer_format: See [`DataArguments`], as the next four.
        question_template: Prompt of a multiple choice question.
        plain_text: Use no chat template.
        plain_choices: Use none for multiple choice.
        chat_template_kwargs: Arguments of the chat templates.
        name: What errors call the data set.
        num_proc: Processes that tokenize; for streamed data none.

    Returns:
        Examples of `input_ids` (the prompt), `answer_ids`, `wrong_answer_ids` (a list of them; empty but for multiple
        choice), `sharer_input_ids`, `sharer_attention_mask` and
        `sharer_alignment` (each one list per sharer) and `length`.

    Raises:
        ValueError: Unknown columns, or a bad row, named. For streamed data the latter comes on iteration.
    """
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset), {}))
    _check_columns(columns, name)
    plain_text = plain_text or (plain_choices and "choices" in columns)
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
