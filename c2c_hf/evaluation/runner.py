"""The run: every item of every task is answered by every method, batch by batch, from wherever a run stopped."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from tqdm.auto import tqdm

from .methods.answerer import MAX_EXAMPLES, ContinuationScore, GeneratedAnswer, Method, Prompt, Query
from .run_records import Record, RunFolder
from .tasks.extraction import asks_for_number, extract_answer, score_answer
from .tasks.task import EvaluationTask, Item

logger = logging.getLogger(__name__)


def answer_tasks(
    folder: RunFolder,
    tasks: Sequence[EvaluationTask],
    methods: Mapping[str, Method],
    batch_size: int = 8,
    seed: int = 0,
    chat: bool = True,
    max_new_tokens: int | None = None,
) -> None:
    """Answer what the folder does not hold yet; every answer is on the disk before the next batch starts.

    Several processes share the batches, which are those that one process would make. An item that fails is recorded as
    wrong, with its error.

    Args:
        folder: Takes the answers.
        tasks: The tasks.
        methods: The methods by name.
        batch_size: Number of prompts per batch.
        seed: Of controls that draw at random.
        chat: Whether generated answers are asked for through each model's chat template, where it has one.
        max_new_tokens: Maximum length of a generated answer; `None`: the task's.
    """
    done = {(record["task"], record["method"], record["id"]) for record in folder.records}
    total = sum(len(task.items) for task in tasks) * len(methods)
    with tqdm(
        total=total, initial=min(len(done), total), unit="answer", disable=not folder.processes.is_main_process
    ) as progress:
        for task in tasks:
            mismatched = task.mismatched_items() if len(task.items) > 1 else {}
            for name, method in methods.items():
                progress.set_description(f"{task.name}, {name}")
                items = [item for item in task.items if (task.name, name, item.id) not in done]
                # Batches of similar length need little padding; the longest come first, and with them failures.
                items.sort(key=lambda item: -len(item.prompt) - sum(map(len, item.choices)))
                batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
                for batch in folder.own_share(batches):
                    queries = [_query(item, mismatched.get(item.id), task, seed, chat) for item in batch]
                    records = _answer(method, task, batch, queries, max_new_tokens)
                    folder.append({"task": task.name, "method": name, **record} for record in records)
                    progress.update(len(batch) * folder.processes.num_processes)
    folder.join()


def _query(item: Item, mismatched: Item | None, task: EvaluationTask, seed: int, chat: bool) -> Query:
    def prompt(text: str) -> Prompt:
        return [{"role": "user", "content": text}] if chat and task.is_generation else text

    return Query(
        prompt(item.prompt),
        seed=item.seed(seed),
        mismatched_prompt=None if mismatched is None else prompt(mismatched.prompt),
        question=item.question,
        context=item.context,
        mismatched_context="" if mismatched is None else mismatched.context,
        examples=task.examples(item, seed, MAX_EXAMPLES),
    )


def _answer(
    method: Method, task: EvaluationTask, items: Sequence[Item], queries: Sequence[Query], max_new_tokens: int | None
) -> Iterator[Record]:
    """Answer a batch; if that fails, answer it one by one, so that only the items that fail are lost."""
    results: list[Record]
    try:
        if task.is_generation:
            answers = method.generate(queries, max_new_tokens or task.max_new_tokens, task.stop)
            results = [_grade(item, answer) for item, answer in zip(items, answers, strict=True)]
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
        asked = {"id": item.id, "subject": item.subject, "answer": item.answer, **_accepted_answers(item)}
        yield {**asked, **result, "seconds": seconds}


def _choose(item: Item, scores: Sequence[ContinuationScore]) -> Record:
    """Choose the continuation of the highest mean log-likelihood per token."""
    means = torch.tensor([score.logprob / score.num_tokens for score in scores])
    prediction = int(means.argmax())
    return {
        "prediction": prediction,
        "correct": int(prediction == item.answer),
        **({"mismatched": int(prediction == item.doc["mismatched_answer"])} if item.mismatched_prompt else {}),
        "confidence": round(float(means.softmax(0).max()), 6),
        "scores": [round(score.logprob, 5) for score in scores],
        "num_tokens": [score.num_tokens for score in scores],
    }


def _grade(item: Item, answer: GeneratedAnswer) -> Record:
    """Grade a generated answer strictly and leniently; one from which nothing is extracted is wrong."""
    grades = score_answer(item.doc, [answer.text])
    mismatched = {}
    if item.mismatched_prompt:
        other = score_answer({"answers": [item.doc["mismatched_answer"]]}, [answer.text])
        mismatched["mismatched"] = int(other["lenient"])
    return {
        "prediction": extract_answer(item.doc, answer.text)[1],
        "correct": int(grades["lenient"]),
        "correct_strict": int(grades["strict"]),
        **mismatched,
        "text": answer.text,
        "num_tokens": answer.num_tokens,
        "prompt_tokens": answer.prompt_tokens,
    }


def _accepted_answers(item: Item) -> Record:
    """Return the accepted answers for F1, where they are words."""
    words = "answers" in item.doc and not asks_for_number(item.doc)
    return {"accepted_answers": item.doc["answers"]} if words else {}
