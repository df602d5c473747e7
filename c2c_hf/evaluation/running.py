"""Answer every item of every task by every method, batch by batch, from wherever a run stopped."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm.auto import tqdm

from .answering import ContinuationScore, Query, Written
from .extraction import read_answer, score_answer
from .methods import Method
from .records import Record, RunFolder
from .tasks import EvaluationTask, Item

logger = logging.getLogger(__name__)


def answer_tasks(
    folder: RunFolder,
    tasks: Sequence[EvaluationTask],
    methods: dict[str, Method],
    batch_size: int = 8,
    seed: int = 0,
    chat: bool = True,
    max_new_tokens: int | None = None,
) -> None:
    """Answer what the folder does not hold yet; every answer is on the disk before the next batch starts.

    An item that fails is recorded as wrong, with its error.

    Args:
        folder: Takes the answers.
        tasks: The tasks.
        methods: The methods by name.
        batch_size: Prompts read together.
        seed: Of controls that draw at random.
        chat: Ask for written answers through each model's chat template, where it has one.
        max_new_tokens: Longest written answer; `None`: as the task says.
    """
    done = {(record["task"], record["method"], record["id"]) for record in folder.records}
    total = sum(len(task.items) for task in tasks) * len(methods)
    with tqdm(total=total, initial=min(len(done), total), unit="answer") as progress:
        for task in tasks:
            donors = task.donors() if len(task.items) > 1 else {}
            for name, method in methods.items():
                progress.set_description(f"{task.name}, {name}")
                items = [item for item in task.items if (task.name, name, item.id) not in done]
                # Neighbours of equal length need little padding; the longest come first, and with them what fails.
                items.sort(key=lambda item: -len(item.prompt) - sum(map(len, item.choices)))
                for start in range(0, len(items), batch_size):
                    batch = items[start : start + batch_size]
                    asked = [_query(item, donors.get(item.id), task, seed, chat) for item in batch]
                    records = _answer(method, task, batch, asked, max_new_tokens)
                    folder.append({"task": task.name, "method": name, **record} for record in records)
                    progress.update(len(batch))


def _query(item: Item, donor: Item | None, task: EvaluationTask, seed: int, chat: bool) -> Query:
    def prompt(text: str) -> Any:
        return [{"role": "user", "content": text}] if chat and task.is_written else text

    return Query(
        prompt(item.prompt),
        seed=item.seed(seed),
        donor=None if donor is None else prompt(donor.prompt),
        question=item.question,
        context=item.context,
        donor_context="" if donor is None else donor.context,
    )


def _answer(
    method: Method, task: EvaluationTask, items: Sequence[Item], queries: Sequence[Query], max_new_tokens: int | None
) -> Iterator[Record]:
    """Answer a batch; if that fails, answer it one by one, so that one bad item costs no other."""
    try:
        if task.is_written:
            written = method.write(queries, max_new_tokens or task.max_new_tokens, task.stop)
            results = [_judge(item, answer) for item, answer in zip(items, written, strict=True)]
        else:
            scores = method.score(queries, [item.choices for item in items])
            results = [_choose(item, choices) for item, choices in zip(items, scores, strict=True)]
    except (ValueError, RuntimeError, IndexError) as error:
        if len(items) > 1:
            for item, query in zip(items, queries, strict=True):
                yield from _answer(method, task, [item], [query], max_new_tokens)
            return
        logger.warning("%s, item %s failed and counts as wrong: %s", task.name, items[0].id, error)
        results = [{"prediction": None, "correct": 0, "error": f"{type(error).__name__}: {error}"}]
    else:
        if method.gate_weights:
            for result, gate_weight in zip(results, method.gate_weights, strict=True):
                result["gate_weight"] = round(gate_weight, 6)
    seconds = {name: round(value / len(items), 6) for name, value in asdict(method.seconds).items()}
    for item, result in zip(items, results, strict=True):
        yield {"id": item.id, "subject": item.subject, "answer": item.answer, **result, "seconds": seconds}


def _choose(item: Item, scores: Sequence[ContinuationScore]) -> Record:
    """Take the continuation of the highest mean log-likelihood per token."""
    means = torch.tensor([score.logprob / score.num_tokens for score in scores])
    prediction = int(means.argmax())
    return {
        "prediction": prediction,
        "correct": int(prediction == item.answer),
        "confidence": round(float(means.softmax(0).max()), 6),
        "scores": [round(score.logprob, 5) for score in scores],
        "num_tokens": [score.num_tokens for score in scores],
    }


def _judge(item: Item, written: Written) -> Record:
    """Read a written answer strictly and leniently; one that cannot be read has no prediction and is wrong."""
    metrics = score_answer(item.doc, [written.text])
    return {
        "prediction": read_answer(item.doc, written.text)[1],
        "correct": int(metrics["lenient"]),
        "correct_strict": int(metrics["strict"]),
        "text": written.text,
        "num_tokens": written.num_tokens,
        "prompt_tokens": written.prompt_tokens,
    }
