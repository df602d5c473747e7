"""Benchmark data in one row format, from the Hub or from a local folder of JSON Lines."""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset
from huggingface_hub import hf_hub_download

from .private_facts import private_facts
from .private_notes import private_notes
from .taught_facts import taught_facts, taught_facts_generate

#: A row of a benchmark, as JSON: `id`, `question`, and `choices` with `answer` (an index) or `answers`.
Row: TypeAlias = dict[str, Any]

LETTERS = "ABCDEFGHIJ"
#: Number of rows for each seed of a data set that is generated.
NUM_PRIVATE_FACTS = 500
#: Data sets that are generated, made-up facts all of them: how, their seeds, and `"choice"` or `"open"`.
_GENERATED: dict[str, tuple[Callable[[int, int], list[Row]], tuple[int, ...], str]] = {
    "private_facts": (private_facts, (0, 1, 2), "choice"),
    "private_notes": (private_notes, (0, 1, 2), "choice"),
    "taught_facts": (taught_facts, (0,), "choice"),
    "taught_facts_generate": (taught_facts_generate, (0,), "open"),
}
#: What rows may have: the question that a mismatched sharer prefills, and its answer as that of the row itself.
_MISMATCHED = ("mismatched_question", "mismatched_answer")
#: What every row of a data set must have.
_COLUMNS = {"choice": ("id", "question", "choices", "answer"), "open": ("id", "question", "answers")}


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        kind: `"choice"` or `"open"`.
        split: Its name in a local folder: the file is `DATASET/SPLIT.jsonl`, or the same with `.gz`.
        path: Its id on the Hub.
        config: Its configuration on the Hub; `None`: all of them, one subject each.
        hub_split: The split on the Hub.
        convert: Turns a row of the Hub into a `Row`.
        archive: A file on the Hub that holds `data/SUBJECT.jsonl`, or `None`: `datasets` loads the repository.
        subjects: Those of the archive.
    """

    kind: str
    split: str
    path: str
    config: str | None
    hub_split: str
    convert: Callable[[Row], Row]
    archive: str | None = None
    subjects: tuple[str, ...] = ()


def _from_labels(row: Row) -> Row:
    """Convert a row of ARC or OpenBookQA, whose choices are labelled by letters or by numbers."""
    labels = row["choices"]["label"]
    question = row["question"] if "question" in row else row["question_stem"]
    return {"question": question, "choices": row["choices"]["text"], "answer": labels.index(row["answerKey"].strip())}


def _from_mmlu_redux(row: Row) -> Row:
    answer, corrected = int(row["answer"]), str(row.get("correct_answer") or "").strip()
    if row["error_type"] == "wrong_groundtruth":
        if corrected.isdigit() and int(corrected) < len(row["choices"]):
            answer = int(corrected)
        elif len(corrected) == 1 and corrected in LETTERS[: len(row["choices"])]:
            answer = LETTERS.index(corrected)
        elif corrected in row["choices"]:
            answer = row["choices"].index(corrected)
    return {
        "question": row["question"],
        "choices": row["choices"],
        "answer": answer,
        "error_type": row["error_type"],
    }


def _from_ceval(row: Row) -> Row:
    choices = [row[letter] for letter in "ABCD"]
    return {"question": row["question"], "choices": choices, "answer": LETTERS.index(row["answer"])}


def _from_gsm8k(row: Row) -> Row:
    solution, _, answer = row["answer"].rpartition("####")
    return {"question": row["question"], "answers": [answer.strip().replace(",", "")], "solution": solution.strip()}


def _from_longbench(row: Row) -> Row:
    return {"question": row["input"], "context": row["context"], "answers": row["answers"]}


#: The question-answering tasks of LongBench: of one document, and of several.
_LONGBENCH = ("qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique")

SOURCES = {
    "arc_challenge": Source("choice", "test", "allenai/ai2_arc", "ARC-Challenge", "test", _from_labels),
    "arc_easy": Source("choice", "test", "allenai/ai2_arc", "ARC-Easy", "test", _from_labels),
    "openbookqa": Source("choice", "test", "allenai/openbookqa", "main", "test", _from_labels),
    "mmlu_redux": Source("choice", "test", "edinburgh-dawg/mmlu-redux-2.0", None, "test", _from_mmlu_redux),
    "ceval": Source("choice", "validation", "ceval/ceval-exam", None, "val", _from_ceval),
    "gsm8k": Source("open", "test", "openai/gsm8k", "main", "test", _from_gsm8k),
    # An archive of JSON Lines with a loading script, which `datasets` does not run.
    "longbench": Source("open", "test", "THUDM/LongBench", None, "test", _from_longbench, "data.zip", _LONGBENCH),
}


def load(dataset: str, data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Load a benchmark: the `custom_dataset` of the task files, called by lm-evaluation-harness.

    Args:
        dataset: A name in [`SOURCES`].
        data_dir: A folder with one subfolder per data set; `None`: the Hub.
        **_: lm-evaluation-harness passes all metadata of a task, such as its version.

    Returns:
        One split, `"test"`, of rows with `id`, `question`, `subject`, `context` (a text that the question is about;
        empty where there is none), and `choices` (a list) with `answer` (an index) or `answers` (a list). Where the
        data say which question a mismatched sharer prefills, also `mismatched_question` and `mismatched_answer`.

    Raises:
        FileNotFoundError: The folder has no such file.
        ValueError: A line is not JSON, or lacks a column.
    """
    if dataset in _GENERATED:
        generate, seeds, kind = _GENERATED[dataset]
        return _as_split(_generated_rows(generate, seeds), kind)
    source = SOURCES[dataset]
    rows = _from_hub(source) if data_dir is None else _from_folder(dataset, source, Path(data_dir))
    # MMLU-Redux marks items without a right choice.
    kept = [row for row in rows if row.get("error_type") != "no_correct_answer"]
    return _as_split(kept, source.kind)


def _as_split(rows: list[Row], kind: str) -> DatasetDict:
    columns = ["subject", "context", *_COLUMNS[kind], *(name for name in _MISMATCHED if rows and name in rows[0])]
    return DatasetDict({"test": Dataset.from_list([{name: row.get(name, "") for name in columns} for row in rows])})


def _generated_rows(generate: Callable[[int, int], list[Row]], seeds: Sequence[int]) -> list[Row]:
    made = ((seed, row) for seed in seeds for row in generate(NUM_PRIVATE_FACTS, seed))
    return [{"subject": f"seed {seed}", **row, "context": row.get("sharer_context", "")} for seed, row in made]


def _from_hub(source: Source) -> list[Row]:
    configs = [source.config] if source.config else source.subjects or get_dataset_config_names(source.path)
    rows = []
    for config in configs:
        for index, row in enumerate(_read_config(source, config)):
            subject = {} if source.config else {"subject": config}
            rows.append({"id": str(row.get("id") or f"{config}/{index}"), **subject, **source.convert(row)})
            if not source.config:
                rows[-1]["id"] = f"{config}/{index}"
    return rows


def _read_config(source: Source, config: str) -> Iterable[Row]:
    if source.archive is None:
        return load_dataset(source.path, config, split=source.hub_split)
    archive = hf_hub_download(source.path, source.archive, repo_type="dataset")
    with zipfile.ZipFile(archive) as files, files.open(f"data/{config}.jsonl") as lines:
        return [json.loads(line) for line in lines]


def _from_folder(dataset: str, source: Source, folder: Path) -> list[Row]:
    plain = folder / dataset / f"{source.split}.jsonl"
    path = next((path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"`data_dir` has no file {str(plain)!r} (or the same with .gz) for {dataset!r}.")
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            rows.append(_parse(line, _COLUMNS[source.kind], f"{path}, line {number}"))
    return rows


def _parse(line: str, columns: Sequence[str], place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}): the file may be cut off.") from error
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"{place} lacks {missing}; a row needs {list(columns)}, but this one has {sorted(row)}.")
    if "choices" in row and not (isinstance(row["answer"], int) and 0 <= row["answer"] < len(row["choices"])):
        raise ValueError(
            f"{place}: `answer` must be an index into the {len(row['choices'])} `choices`, but is {row['answer']!r}."
        )
    return row
