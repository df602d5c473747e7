"""Tasks: items with prompts, choices and answers, loaded by lm-evaluation-harness from the files in `prompts/`."""

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from datasets.exceptions import DatasetNotFoundError

from .benchmark_data import Row

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

#: The task files: prompts, choices, and how an answer is scored.
TASK_FOLDER = Path(__file__).parent / "prompts"
#: Of these tasks' names among those of lm-evaluation-harness; left out here.
PREFIX = "c2c_"


@dataclass(frozen=True)
class Item:
    """One question of a task.

    Attributes:
        id: Unique within the task.
        index: Its position in the whole task.
        prompt: The receiver's prompt, without the context.
        question: The bare question.
        subject: Empty where the task has none.
        choices: Continuations of the prompt to compare, each with its delimiter; empty where the answer is generated.
        answer: Index of the right choice, or the right answer's text.
        doc: The row behind it.
        context: A text that the question is about, for sharers and for methods that prefill it; empty where the task
            has none.
        mismatched_prompt: What a mismatched sharer prefills, where the data say so; else empty, and it is that of
            another item.
    """

    id: str
    index: int
    prompt: str
    question: str
    subject: str
    choices: tuple[str, ...]
    answer: int | str
    doc: Row
    context: str = ""
    mismatched_prompt: str = ""

    def seed(self, seed: int) -> int:
        """Return a seed of this item's own, derived from the run's."""
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.id}".encode()).digest()[:4], "big")

    def right_answer(self) -> str:
        """Return the right continuation of the prompt, with its delimiter."""
        if isinstance(self.answer, int) and self.choices:
            return self.choices[self.answer]
        return f" {self.doc['answers'][0] if 'answers' in self.doc else self.answer}"


@dataclass(frozen=True)
class EvaluationTask:
    """Items, and how they are answered.

    Attributes:
        name: Without `PREFIX`.
        items: All, or a sample of them.
        is_generation: Whether answers are generated; else the choices' likelihoods are compared.
        stop: Strings at which a generated answer ends.
        max_new_tokens: Maximum length of a generated answer.
    """

    name: str
    items: tuple[Item, ...]
    is_generation: bool
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 64

    def mismatched_items(self) -> dict[str, Item]:
        """Return for each item's id another item, for the mismatched-sharer control: of similar length, or its own.

        Raises:
            ValueError: There are fewer than two different prompts.
        """
        ordered = sorted(self.items, key=lambda item: (len(item.prompt), item.id))
        mismatched = {}
        for place, item in enumerate(ordered):
            others = (ordered[(place + step) % len(ordered)] for step in range(1, len(ordered)))
            if item.mismatched_prompt:
                mismatched[item.id] = replace(item, prompt=item.mismatched_prompt)
                continue
            # A benchmark may hold the same question twice.
            other = next((other for other in others if _differs(other, item)), None)
            if other is None:
                raise ValueError(f"`tasks`: {self.name!r} needs at least two different questions for this control.")
            mismatched[item.id] = other
        return mismatched

    def examples(self, item: Item, seed: int, count: int) -> tuple[str, ...]:
        """Return other items' prompts with their answers, drawn at random for each item.

        Args:
            item: The item that they are for.
            seed: Of the run.
            count: Their number; fewer where the task has fewer items.
        """
        others = [other for other in self.items if other.prompt != item.prompt]
        drawn = random.Random(item.seed(seed)).sample(others, min(count, len(others)))
        return tuple(other.prompt + other.right_answer() for other in drawn)


def _differs(other: Item, item: Item) -> bool:
    return other.prompt != item.prompt and (not item.context or other.context != item.context)


def task_names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(path.stem for path in TASK_FOLDER.glob("*/*.yaml"))


def load_tasks(
    names: Sequence[str], data_dir: str | None = None, limit: int | None = None, seed: int = 0
) -> list[EvaluationTask]:
    """Load tasks.

    Args:
        names: Of [`task_names`].
        data_dir: Folder of JSON Lines; `None`: data from the Hub.
        limit: Number of items of each, drawn at random but the same ones for the same seed; `None`: all.
        seed: Of that draw.

    Raises:
        ValueError: A name is unknown, or the data are damaged.
        FileNotFoundError: The data are missing.
        ImportError: lm-evaluation-harness is not installed.
    """
    known = task_names()
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"`tasks` must be among {known}, but got {unknown}.")
    manager = _task_manager(data_dir)
    return [_load_task(manager, name, limit, seed) for name in names]


def _task_manager(data_dir: str | None) -> "TaskManager":
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('evaluation needs lm-evaluation-harness: run `pip install "c2c_hf[eval]"`.') from error
    # It logs hints about its own options for each task.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {} if data_dir is None else {"data_dir": data_dir}
    return TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata)


def _load_task(manager: "TaskManager", name: str, limit: int | None, seed: int) -> EvaluationTask:
    try:
        task = manager.load([PREFIX + name])["tasks"][PREFIX + name]
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"the data of {name!r} could not be fetched from the Hub; give a local folder as `data_dir`. ({error})"
        ) from error
    docs = list(task.test_docs())
    indices = list(range(len(docs)))
    if limit is not None and limit < len(docs):
        indices = sorted(random.Random(seed).sample(indices, limit))
    compares = task.OUTPUT_TYPE == "multiple_choice"
    items = []
    for index in indices:
        doc = docs[index]
        other = {"context": "", "question": doc.get("mismatched_question", "")}
        choices = [task.config.target_delimiter + choice for choice in task.doc_to_choice(doc)] if compares else []
        items.append(
            Item(
                id=doc["id"],
                index=index,
                # Whether the context is part of a prompt depends on the method.
                prompt=task.doc_to_text({**doc, "context": ""}).lstrip(),
                question=doc["question"],
                subject=doc["subject"],
                choices=tuple(choices),
                answer=task.doc_to_target(doc),
                doc=doc,
                context=doc["context"],
                mismatched_prompt=task.doc_to_text({**doc, **other}).lstrip() if other["question"] else "",
            )
        )
    if compares:
        return EvaluationTask(name, tuple(items), is_generation=False)
    generation = task.config.generation_kwargs
    return EvaluationTask(name, tuple(items), True, tuple(generation["until"]), generation["max_gen_toks"])
