"""Reading: answers to questions about passages, scored and generated, and how much of the prefill's gain they keep."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import ttest_rel
from tqdm.auto import tqdm

from ..alignment.chat_template import Message
from .methods.answerer import Answerer, Method, Query
from .methods.baselines import TextToText
from .methods.registry import FUSER_FREE_METHODS
from .metrics.exact_match_f1 import answer_scores
from .metrics.intervals import paired_difference
from .run_records import Json, Record, RunFolder, SharedLines, group_records
from .tasks.reading import SHORT_ANSWER, ReadingTask
from .tasks.task import Item

#: Tokens of a right answer that are scored; shorter answers are scored with their end.
MAX_ANSWER_TOKENS = 64
#: What is compared, by its name in a record.
MEASURES = {
    "loglikelihood": "log-likelihood per answer token",
    "contains": "containment",
    "f1": "F1",
    "exact_match": "exact match",
}
#: Upper ends of the bins of passages by length in characters.
LENGTHS = (500, 1000, 2000, 4000, 8000)
_NUM_RESAMPLES = 10_000


class BaselineFile:
    """Answers of methods that do not depend on the fuser, for later evaluations of other fusers.

    Args:
        path: JSON Lines; made when the first answer is added.
        folder: Of the run, whose processes extend the file.
        settings: What the answers depend on beside the item and the method: models, dtype, lengths.
        methods: Names of methods, of which those in `FUSER_FREE_METHODS` count.
    """

    def __init__(self, path: Path, folder: RunFolder, settings: Json, methods: Iterable[str]) -> None:
        self.settings = settings
        self._lines = SharedLines(path, folder.path, folder.processes)
        self.methods = [name for name in methods if name.rstrip("_0123456789") in FUSER_FREE_METHODS]
        self._records: dict[str, Record] = {}
        self.join()

    def join(self) -> None:
        """Wait until every process is here, and load the answers of all."""
        entries = [json.loads(line) for line in self._lines.join()]
        self._records = {entry["key"]: entry["record"] for entry in entries}

    def find(self, method: str, item: Item) -> Record | None:
        """Return what is known of an answer; `None`: nothing."""
        return self._records.get(self._key(method, item)) if method in self.methods else None

    def add(self, method: str, items: Sequence[Item], records: Sequence[Record]) -> None:
        """Write answers; of other methods none."""
        if method not in self.methods:
            return
        new = {self._key(method, item): record for item, record in zip(items, records, strict=True)}
        self._lines.append({"key": key, "record": record} for key, record in new.items())
        self._records |= new

    def _key(self, method: str, item: Item) -> str:
        asked = [self.settings, method, item.prompt, item.id]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def answer_reading(
    folder: RunFolder,
    tasks: Sequence[ReadingTask],
    methods: Mapping[str, Method],
    baselines: BaselineFile | None = None,
    batch_size: int = 8,
    chat: bool = True,
    max_new_tokens: int | None = None,
) -> None:
    """Answer what the folder does not hold yet; every answer is on the disk before the next batch starts.

    Several processes share the batches.

    Args:
        folder: Takes the answers.
        tasks: The tasks.
        methods: The methods by name.
        baselines: Takes and gives the answers of methods that do not depend on the fuser.
        batch_size: Number of prompts per batch.
        chat: Whether questions are asked through each model's chat template, where it has one.
        max_new_tokens: Maximum length of a generated answer; `None`: the task's.
    """
    done = {(record["task"], record["method"], record["id"]) for record in folder.records}
    total = sum(len(task.items) for task in tasks) * len(methods)
    with tqdm(total=total, unit="answer", disable=not folder.processes.is_main_process) as progress:
        for task in tasks:
            mismatched = task.mismatched_items() if "mismatched" in methods else {}
            for start in folder.own_share(range(0, len(task.items), batch_size)):
                # All methods answer a batch before the next one, since they share the sharers' caches.
                for name, method in methods.items():
                    progress.set_description(f"{task.name}, {name}")
                    batch = task.items[start : start + batch_size]
                    items = [item for item in batch if (task.name, name, item.id) not in done]
                    known = [None if baselines is None else baselines.find(name, item) for item in items]
                    new = [item for item, record in zip(items, known, strict=True) if record is None]
                    answered: list[Record] = []
                    if new:
                        others = [mismatched.get(item.id) for item in new]
                        answered = _answer(method, new, others, chat, max_new_tokens or task.max_new_tokens)
                    if baselines is not None:
                        baselines.add(name, new, answered)
                    fresh = iter(answered)
                    found = [next(fresh) if record is None else record for record in known]
                    folder.append(
                        {"task": task.name, "method": name, "id": item.id, **record}
                        for item, record in zip(items, found, strict=True)
                    )
                    progress.update(len(batch) * folder.processes.num_processes)
    if baselines is not None:
        baselines.join()
    folder.join()


def _answer(
    method: Method, items: Sequence[Item], others: Sequence[Item | None], chat: bool, max_new_tokens: int
) -> list[Record]:
    """Score the right answers of a batch, and generate answers."""
    chat = chat and _has_chat_template(method)

    def queries(asked: Sequence[str]) -> list[Query]:
        return [
            Query(
                _chat(text) if chat else f"{text}\nAnswer:",
                question=item.question,
                context=item.context,
                mismatched_context="" if other is None else other.context,
                max_answer_tokens=MAX_ANSWER_TOKENS,
            )
            for text, item, other in zip(asked, items, others, strict=True)
        ]

    delimiter, stop = ("", ()) if chat else (" ", ("\n",))
    scores = method.score(
        queries([item.question for item in items]), [[delimiter + choice for choice in item.choices] for item in items]
    )
    scoring = method.seconds.total
    answers = method.generate(queries([item.prompt for item in items]), max_new_tokens, stop)
    generating = method.seconds.total
    records = []
    for item, (score,), answer in zip(items, scores, answers, strict=True):
        accepted = item.doc["answers"]
        found = answer_scores(answer.text, accepted)
        records.append(
            {
                "question": item.question,
                "accepted_answers": accepted,
                "context_length": len(item.context),
                "loglikelihood": round(score.logprob, 5),
                "num_answer_tokens": score.num_tokens,
                "text": answer.text,
                "correct": int(found.contains),
                **found._asdict(),
                "seconds": {
                    "score": round(scoring / len(items), 4),
                    "generate": round(generating / len(items), 4),
                },
            }
        )
    return records


def _has_chat_template(method: Method) -> bool:
    answers = method.receiver if isinstance(method, TextToText) else method
    return isinstance(answers, Answerer) and bool(answers.tokenizer.chat_template)


def _chat(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


Values = npt.NDArray[np.float64]


def compute_reading(records: Sequence[Record], seed: int = 0) -> list[Json]:
    """Compute the figures of reading tasks.

    Args:
        records: Of these tasks.
        seed: Of the bootstraps.

    Returns:
        Per task `task`, `num_items`, `methods` (per method and measure of `MEASURES` its `value` and `interval`),
        `shares` (per measure `prefill_gain`, and the shares `memory` and `right_over_another`, each `value` and
        `interval` or `None` where the prefill gains nothing, and the paired `p_value` of right over another), and
        `lengths`: the same by the length of the passage, without intervals.
    """
    results = []
    for task, by_method in group_records(records).items():
        common = sorted(set.intersection(*(set(found) for found in by_method.values())))
        answered = {method: [found[item] for item in common] for method, found in by_method.items()}
        results.append(
            {
                "task": task,
                "num_items": len(common),
                "methods": {
                    method: {
                        measure: dict(zip(("value", "interval"), _mean(_columns(rows, measure), seed), strict=True))
                        for measure in MEASURES
                    }
                    for method, rows in answered.items()
                },
                "shares": {measure: _shares(answered, measure, seed) for measure in MEASURES},
                "lengths": list(_by_length(answered)),
            }
        )
    return results


def _columns(rows: Sequence[Record], measure: str) -> tuple[Values, Values]:
    """Return a measure's sum and weight for each item."""
    weights = [row["num_answer_tokens"] if measure == "loglikelihood" else 1.0 for row in rows]
    return np.array([row[measure] for row in rows], dtype=float), np.array(weights, dtype=float)


def _mean(columns: tuple[Values, Values], seed: int) -> tuple[float, list[float]]:
    """Return a weighted mean and its 95 % bootstrap interval."""
    sums, weights = columns
    drawn = _resample(seed, lambda index: sums[index].sum(1) / weights[index].sum(1), len(sums))
    return float(sums.sum() / weights.sum()), _percentiles(drawn)


def _resample(seed: int, statistic: Callable[[npt.NDArray[np.int64]], Values], num_items: int) -> Values:
    """Compute a statistic of bootstrap resamples; it maps `(num_resamples, num_items)` indices to one value each."""
    generator = np.random.default_rng(seed)
    # In parts, since all resamples at once would fill the memory.
    parts = [statistic(generator.integers(0, num_items, (500, num_items))) for _ in range(_NUM_RESAMPLES // 500)]
    return np.concatenate(parts)


def _percentiles(values: Values) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def _shares(answered: Mapping[str, Sequence[Record]], measure: str, seed: int) -> Json | None:
    """Return how much of what the prefilled context gains the memory gains, and how much of that is the passage's."""
    if not {"receiver", "receiver_with_context", "c2c"} <= answered.keys():
        return None
    columns = {method: _columns(rows, measure)[0] for method, rows in answered.items()}
    gains = columns["receiver_with_context"] - columns["receiver"]
    _, weights = _columns(answered["receiver"], measure)
    result: Json = {"prefill_gain": float(gains.sum() / weights.sum())}
    for name, base in (("memory", "receiver"), ("right_over_another", "mismatched")):
        if base in columns:
            result[name] = _share(columns["c2c"] - columns[base], gains, seed)
    if "mismatched" in columns:
        result["p_value"] = _p_value(columns["c2c"], columns["mismatched"], seed)
    return result


def _share(differences: Values, gains: Values, seed: int) -> Json | None:
    if gains.sum() <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = _resample(seed, lambda index: differences[index].sum(1) / gains[index].sum(1), len(gains))
    return {"value": float(differences.sum() / gains.sum()), "interval": _percentiles(drawn[np.isfinite(drawn)])}


def _p_value(values: Values, others: Values, seed: int) -> float:
    """Return the p-value of McNemar's exact test where all values are 0 or 1, else of the paired t-test."""
    if set(np.unique([values, others])) <= {0.0, 1.0}:
        return paired_difference(values.tolist(), others.tolist(), seed).p_value
    return float(ttest_rel(values, others).pvalue)


def _by_length(answered: Mapping[str, Sequence[Record]]) -> Iterator[Json]:
    lengths = np.array([row["context_length"] for row in next(iter(answered.values()))])
    places = np.digitize(lengths, LENGTHS, right=True)
    for place in np.unique(places):
        chosen = np.flatnonzero(places == place).tolist()
        means: dict[str, dict[str, float]] = {}
        for method, rows in answered.items():
            part = [rows[index] for index in chosen]
            columns = {measure: _columns(part, measure) for measure in MEASURES}
            means[method] = {
                measure: float(sums.sum() / weights.sum()) for measure, (sums, weights) in columns.items()
            }
        yield {
            "from": 0 if place == 0 else LENGTHS[place - 1] + 1,
            "to": LENGTHS[place] if place < len(LENGTHS) else None,
            "num_items": len(chosen),
            "methods": means,
        }


def headline(reading: Sequence[Json]) -> Iterator[str]:
    """Yield the first lines of a report: shares of what the prefilled context gains."""
    for result in reading:
        for measure, shares in result["shares"].items():
            if shares is None:
                continue
            if shares["memory"] is None:
                yield f"**{result['task']}, {MEASURES[measure]}**: no share, prefilling gains nothing."
                continue
            line = f"**{result['task']}, {MEASURES[measure]}: {_share_text(shares['memory'])} of the prefill gain**"
            if shares.get("right_over_another") is not None:
                line += (
                    f"; right over another {_share_text(shares['right_over_another'])}, p = {shares['p_value']:.0e}"
                )
            yield f"{line}, {result['num_items']} questions."


def _share_text(share: Json) -> str:
    low, high = share["interval"]
    return f"{100 * share['value']:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def _value_text(measure: str, value: float, interval: Sequence[float] | None = None) -> str:
    scale, digits = (1, 3) if measure == "loglikelihood" else (100, 1)
    ends = "" if interval is None else f" [{', '.join(f'{scale * end:.{digits}f}' for end in interval)}]"
    return f"{scale * value:.{digits}f}{ends}"


def tables(reading: Sequence[Json], labels: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the tables: per task a row for each method, and one table by the length of the passage."""
    for result in reading:
        yield from (f"## {result['task']}, {result['num_items']} questions", "")
        yield f"| method | {' | '.join(MEASURES.values())} |"
        yield f"| --- |{' --- |' * len(MEASURES)}"
        for method, values in result["methods"].items():
            cells = [_value_text(name, found["value"], found["interval"]) for name, found in values.items()]
            yield f"| {method} | {' | '.join(cells)} |"
        yield ""
        for measure in ("loglikelihood", "contains", "f1"):
            yield f"| {MEASURES[measure]} by characters of the passage | questions | {' | '.join(result['methods'])} |"
            yield f"| --- |{' --- |' * (1 + len(result['methods']))}"
            for part in result["lengths"]:
                cells = [_value_text(measure, found[measure]) for found in part["methods"].values()]
                upper = "more" if part["to"] is None else part["to"]
                yield f"| {part['from']} to {upper} | {part['num_items']} | {' | '.join(cells)} |"
            yield ""
    used = dict.fromkeys(method for result in reading for method in result["methods"])
    yield from (f"- **{name}**: {labels.get(name, labels['sharer'])}" for name in used)
    yield ""
    yield (
        f"Each method's log-likelihood is that of the first accepted answer with its end, at most {MAX_ANSWER_TOKENS} "
        f"of its own tokens. Greedy answers to the question with {SHORT_ANSWER!r} are compared with all accepted "
        "answers after normalization as in SQuAD. Intervals are 95 %, of a bootstrap over questions."
    )
    yield ""
