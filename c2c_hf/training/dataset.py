"""Training data: JSON Lines files or data sets of the Hub -> tokenized examples.

| kind of row | columns |
| --- | --- |
| chat | `messages` of `role` and `content`, or `conversations` of `from` and `value` (ShareGPT) |
| multiple choice | `question`, `choices` (texts), `answer` (index) |
| prompt and completion | `prompt`, `completion`: two texts, or the messages of a chat and those that are learned |
| questions on passages | `context`, `question`, `answers` (texts, or in `text` as in SQuAD); the first is learned |
| text, in memory mode on the receiver's grid | `text`; what is before a random cut is sharer-only context |

Of questions on passages, the passage is the sharer-only context, and up to three questions on it are turns of one
chat. In memory mode these columns come before those of multiple choice, which some such files have as well. Each other
kind may have `sharer_context`, a text that only the sharers prefill, and `id`, which errors name.
"""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..processing_c2c import C2CProcessor
from .passages import PASSAGE_COLUMNS, passage_chats
from .tokenization import EXAMPLE_COLUMNS, FITS_COLUMN, QUESTION_TEMPLATE, RowTokenizer, check_columns

logger = logging.getLogger(__name__)

_JSON_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def is_file_name(name: str) -> bool:
    """Return whether a name is that of a JSON Lines file, and no Hub id."""
    return name.endswith(_JSON_ENDINGS)


def load_rows(
    name: str, split: str = "train", config: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load one data set.

    Args:
        name: A JSON Lines file, plain or gzip, or a Hub id.
        split: Split of a Hub data set; a file has only one.
        config: Configuration name of a Hub data set.
        streaming: Load rows when they are iterated over.

    Raises:
        ValueError: The file does not exist or is no JSON Lines in UTF-8, naming the row.
    """
    if not is_file_name(name):
        return load_dataset(name, config, split=split, streaming=streaming)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"The data file {name!r} does not exist.")
    _check_lines(path, parse=False)
    try:
        return load_dataset("json", data_files=str(path), split="train", streaming=streaming)
    except (DatasetGenerationError, ValueError) as error:
        _check_lines(path, parse=True)
        cause = error.__cause__ or error
        raise ValueError(f"{name!r} could not be read as JSON Lines, one object a row: {cause}") from error


def _check_lines(path: Path, parse: bool) -> None:
    """Raise `ValueError` for the first row that is not UTF-8 or, with `parse`, no JSON object."""
    lines = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    number = 0
    with lines:
        try:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if parse and text.strip() and not isinstance(json.loads(text), dict):
                    raise ValueError("it is no object")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"Row {number} of {path} is not UTF-8 (byte 0x{byte:02x}): convert the file.") from None
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged behind row {number}: {error}") from None
        except ValueError as error:
            raise ValueError(f"Row {number} of {path} is no JSON object: {error}.") from None


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
    continuation_length: int = 48,
    min_prefix_length: int = 24,
    max_prefix_length: int | None = None,
    seed: int = 42,
) -> Dataset | IterableDataset:
    """Tokenize a data set for [`C2CDataCollator`], one example per assistant turn, in memory mode per chat.

    Args:
        dataset: Rows of one of the kinds above; examples are returned as they are.
        processor: The pair's.
        max_length: Largest number of receiver tokens, and of each sharer's. Answers are cut there; examples whose
            prompt leaves no room for an answer are dropped, and their number is logged (of streamed data: each).
        answer_format: Answer to a multiple choice question: `"letter"`, `"text"` of the choice, or `"both"`.
        question_template: Prompt of a multiple choice question, with `{question}` and, unless the answer is a
            `"text"`, `{choices}`.
        plain_text: Take prompts as plain text although the receiver has a chat template.
        plain_choices: The same for multiple choice only.
        chat_template_kwargs: Arguments of the chat templates, such as `{"enable_thinking": False}`.
        name: Of the data set, for errors.
        num_proc: Processes that tokenize; not used for streamed data.
        continuation_length: Of `text` rows: largest number of receiver tokens behind the cut, of which there are at
            least half as many.
        min_prefix_length: Smallest number of receiver tokens in front of the cut; texts that are too short are
            dropped.
        max_prefix_length: Largest number of them. `None`: as many as fit in `max_length`.
        seed: Of the cuts, and of the order, number and wording of questions on passages.

    Returns:
        Rows of [`~training.tokenization.Example`].

    Raises:
        ValueError: Unknown columns, or a bad row, named; of streamed data the latter is raised on iteration.
    """
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset), {}))
    if EXAMPLE_COLUMNS <= set(columns):
        return dataset
    check_columns(columns, name)
    is_choice = "choices" in columns and processor.mode != "memory"
    if PASSAGE_COLUMNS <= set(columns) and not is_choice:
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"{name}: questions on passages cannot be streamed, since those on one are gathered.")
        dataset = passage_chats(dataset, name, seed)
        columns = dataset.column_names
    # Built now, so that no process builds them again, and the fingerprint in the cache of `datasets` covers them.
    _ = processor.token_tables
    tokenize = RowTokenizer(
        processor,
        max_length,
        answer_format,
        question_template,
        plain_text or (plain_choices and "choices" in columns),
        chat_template_kwargs or {},
        name,
        isinstance(dataset, IterableDataset),
        continuation_length,
        min_prefix_length,
        max_prefix_length,
        seed,
    )
    arguments: dict[str, object] = {"batched": True, "with_indices": True, "remove_columns": columns}
    if isinstance(dataset, IterableDataset):
        examples = dataset.map(tokenize, batch_size=8, **arguments)
        return examples.filter(lambda fits: fits, input_columns=FITS_COLUMN).remove_columns(FITS_COLUMN)
    examples = dataset.map(tokenize, batch_size=200, num_proc=num_proc, desc=f"Tokenizing {name}", **arguments)
    kept = examples.filter(lambda fits: fits, input_columns=FITS_COLUMN).remove_columns(FITS_COLUMN)
    if dropped := len(examples) - len(kept):
        logger.warning(
            "Dropped %d of %d examples of %s, whose prompts leave no room for an answer in `max_length=%d` tokens.",
            dropped,
            len(examples),
            name,
            max_length,
        )
    if not len(kept):
        raise ValueError(
            f"{name} leaves no example to use: it is empty, its texts are too short, or `max_length={max_length}` is "
            "too small."
        )
    return kept
