"""Questions on passages -> chats with the passage as sharer-only context; and which texts share words with others."""

import hashlib
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

#: Columns of a data set of questions on passages, as in SQuAD.
PASSAGE_COLUMNS = frozenset({"context", "question", "answers"})
#: Words in a row that two texts must have in common to overlap.
OVERLAP_WORDS = 20
#: Most questions on one passage that become turns of one chat.
MAX_QUESTIONS = 3

_PLAIN_WORDINGS = ("{question}", "Question: {question}", "Answer this question about the text: {question}")
_SHORT_WORDINGS = (
    "{question}\nAnswer with a few words.",
    "{question} Answer with a few words.",
    "Answer with a few words. {question}",
    "Question: {question}\nAnswer with a few words.",
    "Answer in a few words: {question}",
)
#: An answer of at most this many words may be asked for as a short one.
_SHORT_ANSWER_WORDS = 6
#: Share of the questions that stay as they are.
_PLAIN_SHARE = 0.4


def word_question(question: str, answer: str, generator: random.Random) -> str:
    """Word a question: now and then with an introduction, or asking for few words where the answer is short."""
    wordings = _PLAIN_WORDINGS + (_SHORT_WORDINGS if len(answer.split()) <= _SHORT_ANSWER_WORDS else ())
    wording = _PLAIN_WORDINGS[0] if generator.random() < _PLAIN_SHARE else generator.choice(wordings)
    # `str.format` would fail on a question with braces.
    return wording.replace("{question}", question)


def first_answer(answers: object) -> str:
    """Return the first answer of a row that is not empty, `""` for none.

    Args:
        answers: A list of texts, or a dictionary with one under `text`, as in SQuAD.

    Raises:
        ValueError: It is something else.
    """
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"`answers` must be a list of texts, or a dictionary with one in `text`, got {answers!r:.80}."
        )
    return next((text.strip() for text in texts if text.strip()), "")


def passage_chats(dataset: Dataset, name: str, seed: int) -> Dataset:
    """Make chats of questions on passages: one to three questions on a passage are the turns of one chat.

    Args:
        dataset: Rows with `PASSAGE_COLUMNS`; the first answer is the one to train on, rows without any are left out.
        name: Of the data set, for errors.
        seed: Of the order of the questions, their number per chat and their wording.

    Returns:
        Rows with `sharer_context` and `messages`.

    Raises:
        ValueError: A bad row, named, or no answers at all.
    """
    questions: dict[str, list[tuple[str, str]]] = {}
    for number, row in enumerate(dataset, start=1):
        for column in ("context", "question"):
            if not isinstance(row[column], str) or not row[column].strip():
                raise ValueError(
                    f"Row {number} of {name}: `{column}` must be a text that is not empty, but got "
                    f"{row[column]!r:.80}."
                )
        try:
            answer = first_answer(row["answers"])
        except ValueError as error:
            raise ValueError(f"Row {number} of {name}: {error}") from None
        if answer:
            questions.setdefault(row["context"].strip(), []).append((row["question"].strip(), answer))
    if not questions:
        raise ValueError(f"{name} has no question with an answer.")
    generator, chats = random.Random(seed), []
    for context, own in questions.items():
        generator.shuffle(own)
        while own:
            count = generator.randint(1, MAX_QUESTIONS)
            turns, own = own[:count], own[count:]
            messages = []
            for question, answer in turns:
                messages.append({"role": "user", "content": word_question(question, answer, generator)})
                messages.append({"role": "assistant", "content": answer})
            chats.append({"sharer_context": context, "messages": messages})
    return Dataset.from_list(chats)


def word_runs(text: str, length: int = OVERLAP_WORDS) -> set[int]:
    """Return hashes of all runs of `length` words of a text, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    runs = (" ".join(words[i : i + length]) for i in range(len(words) - length + 1))
    # Python's own hash of a text differs between processes.
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs}


def row_texts(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the passages, prompts and messages of a row of any kind."""
    for column in ("sharer_context", "context", "text", "question", "prompt", "completion"):
        if isinstance(row.get(column), str):
            yield row[column]
    for message in row.get("messages") or row.get("conversations") or ():
        content = message.get("content", message.get("value"))
        if isinstance(content, str):
            yield content


def rows_word_runs(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Return the [`word_runs`] of all texts of a data set."""
    return {run for text in {text for row in rows for text in row_texts(row)} for run in word_runs(text)}


def exclude_overlaps(
    dataset: Dataset | IterableDataset, runs: set[int], name: str = "the data set"
) -> Dataset | IterableDataset:
    """Leave out rows whose texts share a run of words with others; of a data set in memory their number is logged.

    Args:
        dataset: Rows of any kind.
        runs: From [`rows_word_runs`].
        name: Of the data set, for the log.
    """

    def is_apart(row: Mapping[str, Any]) -> bool:
        return all(runs.isdisjoint(word_runs(text)) for text in row_texts(row))

    if isinstance(dataset, IterableDataset):
        return dataset.filter(is_apart)
    kept = [index for index, row in enumerate(dataset) if is_apart(row)]
    if dropped := len(dataset) - len(kept):
        logger.warning(
            "Left out %d of %d rows of %s, which share %d words in a row with `excluded_data`.",
            dropped,
            len(dataset),
            name,
            OVERLAP_WORDS,
        )
    return dataset.select(kept)
