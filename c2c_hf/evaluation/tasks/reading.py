"""Reading: questions about passages from JSON Lines files, with accepted answers in words."""

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .task import EvaluationTask, Item

#: The name of the task family on the command line; each file is a task of its own.
READING = "reading"
#: Added to the question where an answer is generated.
SHORT_ANSWER = "Answer with a few words."
#: Longest passage in characters.
MAX_LENGTH = 2000


@dataclass(frozen=True)
class ReadingTask(EvaluationTask):
    """Questions about passages: the right answer's log-likelihood is computed, and an answer is generated.

    The items are in the order of their passages' lengths, so that batches of neighbours need little padding.
    """

    def mismatched_items(self) -> dict[str, Item]:
        """Return for each item's id another item with a passage of similar length, for the mismatched control.

        Neighbours exchange their passages; one that is left over gets that of the item before it.

        Raises:
            ValueError: All items have the same passage.
        """
        items, mismatched = self.items, {}
        for place, item in enumerate(items):
            is_first_of_two = place % 2 == 0 and place + 1 < len(items)
            steps = (1, -1) if is_first_of_two else (-1, 1)
            nearby = (place + sign * step for step in range(1, len(items)) for sign in steps)
            others = (items[index] for index in nearby if 0 <= index < len(items))
            other = next((other for other in others if other.context != item.context), None)
            if other is None:
                raise ValueError(f"`data`: {self.name!r} needs at least two different passages for this control.")
            mismatched[item.id] = other
        return mismatched


def load_reading(
    path: str | Path, limit: int | None = None, seed: int = 0, max_length: int = MAX_LENGTH
) -> ReadingTask:
    r"""Load questions about passages; one per passage comes first, then further ones.

    Args:
        path: JSON Lines file, plain or gzip. A row has `context`, `question` and `answers`, a list of accepted texts;
            or it is a chat, `messages`, of one user message `"question\n\ncontext"` and the answer. Other rows are
            skipped.
        limit: Number of questions, drawn at random but the same ones for the same seed; `None`: all.
        seed: Of that draw.
        max_length: Longest passage in characters; longer ones are left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a JSON object, or the file holds no question with a passage.
    """
    path = Path(path)
    questions: dict[str, list[tuple[str, list[str]]]] = {}
    for context, question, answers in _rows(path):
        if len(context) <= max_length:
            questions.setdefault(context, []).append((question, answers))
    if not questions:
        raise ValueError(
            f"`data`: {str(path)!r} holds no question about a passage of at most {max_length} characters."
        )
    generator = random.Random(seed)
    passages = list(questions)
    generator.shuffle(passages)
    drawn = [(passage, *generator.choice(questions[passage])) for passage in passages]
    rest = [(passage, *row) for passage in passages for row in questions[passage]]
    generator.shuffle(rest)
    unique: dict[tuple[str, str], list[str]] = {}
    for passage, question, answers in [*drawn, *rest]:
        unique.setdefault((passage, question), answers)
    items = [_item(index, *asked, unique[asked]) for index, asked in enumerate(list(unique)[:limit])]
    items.sort(key=lambda item: (len(item.context), item.index))
    name = f"{path.resolve().parent.name}/{path.name.removesuffix('.gz').rpartition('.')[0]}"
    return ReadingTask(name, tuple(items), is_generation=True, max_new_tokens=16)


def _item(index: int, context: str, question: str, answers: Sequence[str]) -> Item:
    return Item(
        # A larger sample or another order of the file changes no id.
        id=hashlib.sha256(json.dumps([context, question, answers]).encode()).hexdigest()[:16],
        index=index,
        prompt=f"{question}\n{SHORT_ANSWER}",
        question=question,
        subject="",
        choices=(answers[0],),
        answer=answers[0],
        doc={"answers": list(answers)},
        context=context,
    )


def _rows(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield passage, question and accepted answers of every row that has them."""
    if not path.is_file():
        raise FileNotFoundError(f"the data file {str(path)!r} does not exist.")
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                context, question, answers = _parse(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"`data`: line {number} of {str(path)!r} must be an object with `context`, `question` and "
                    f"`answers`, or with `messages` ({type(error).__name__}: {error})."
                ) from error
            answers = [answer.strip() for answer in answers if answer.strip()]
            if context.strip() and question.strip() and answers:
                yield context.strip(), question.strip(), answers


def _parse(row: dict[str, Any]) -> tuple[str, str, list[str]]:
    if "messages" not in row:
        return row["context"], row["question"], row["answers"]
    messages = row["messages"]
    question, _, context = messages[0]["content"].partition("\n\n")
    return (context, question, [messages[1]["content"]]) if len(messages) == 2 else ("", "", [])
