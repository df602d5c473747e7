"""Benchmark data and task files: both sources give one format, and damage gives one sentence."""

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from evaluation_for_tests import NEEDS, choice_rows, data_dir, write_rows  # noqa: F401

from c2c_hf.evaluation.tasks import benchmark_data
from c2c_hf.evaluation.tasks.benchmark_data import SOURCES, load
from c2c_hf.evaluation.tasks.task import TASK_FOLDER, load_tasks, task_names

pytest.importorskip("lm_eval", reason=NEEDS)

ARC = {
    "id": "7",
    "question": "Where?",
    "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
    "answerKey": "3",
}
HUB = {
    "arc_challenge": ARC,
    "arc_easy": {**ARC, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "openbookqa": {
        "id": "8",
        "question_stem": "Where?",
        "choices": {"text": ["a", "b"], "label": ["A", "B"]},
        "answerKey": " B",
    },
    "mmlu_redux": {
        "question": "Where?",
        "choices": ["a", "b"],
        "answer": 1,
        "error_type": "ok",
        "correct_answer": None,
    },
    "ceval": {"id": 5, "question": "哪里？", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "C", "explanation": ""},
    "gsm8k": {"question": "How many?", "answer": "1,000 + 234\n#### 1,234"},
    "longbench": {"input": "Wo?", "context": "Sie steht\u2028in Jena.", "answers": ["in Jena"], "_id": "f00"},
}


@pytest.mark.parametrize("name", SOURCES)
def test_rows_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str, split: str) -> list[dict[str, Any]]:
        asked.append((path, config, split))
        return [HUB[name]]

    def hf_hub_download(path: str, name_there: str, repo_type: str) -> Path:
        asked.append((path, name_there, "test"))
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for subject in SOURCES[name].subjects:
                archive.writestr(f"data/{subject}.jsonl", json.dumps(HUB[name], ensure_ascii=False) + "\n")
        return tmp_path / "data.zip"

    monkeypatch.setattr(benchmark_data, "load_dataset", load_dataset)
    monkeypatch.setattr(benchmark_data, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(benchmark_data, "get_dataset_config_names", lambda path: ["first", "second"])
    loaded = load(name)["test"]
    subjects = [row["subject"] for row in loaded]
    several = {
        "mmlu_redux": ["first", "second"],
        "ceval": ["first", "second"],
        "longbench": [*benchmark_data._LONGBENCH],
    }
    assert subjects == several.get(name, [""])
    assert len(set(loaded["id"])) == len(loaded)
    assert {(path, split) for path, _, split in asked} == {(SOURCES[name].path, SOURCES[name].hub_split)}
    if name == "gsm8k":
        assert loaded[0]["answers"] == ["1234"]
    elif name == "longbench":
        assert loaded[0]["context"] == "Sie steht\u2028in Jena."
    else:
        assert loaded[0]["choices"][loaded[0]["answer"]] == {"arc_challenge": "c", "ceval": "c"}.get(name, "b")


@pytest.mark.parametrize(
    ("correct_answer", "answer"), [("0", 0), ("A", 0), ("a planet", 0), ("neither of them", 1), (None, 1), ("7", 1)]
)
def test_corrected_answers_of_mmlu_redux(
    correct_answer: str | None, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"question": "?", "choices": ["a planet", "b"], "answer": 1, "error_type": "wrong_groundtruth"}
    none = {**row, "error_type": "no_correct_answer", "correct_answer": None}
    monkeypatch.setattr(
        benchmark_data, "load_dataset", lambda *_, split: [{**row, "correct_answer": correct_answer}, none]
    )
    monkeypatch.setattr(benchmark_data, "get_dataset_config_names", lambda path: ["first"])
    loaded = load("mmlu_redux")["test"]
    assert loaded["answer"] == [answer], "the item without a right choice is left out"


def test_every_data_set_has_its_task_files() -> None:
    names = task_names()
    for dataset, source in SOURCES.items():
        expected = {dataset, f"{dataset}_letter", f"{dataset}_generate"}
        assert (expected if source.kind == "choice" else {f"{dataset}_generate"}) <= set(names)
    for name in names:
        assert f"task: c2c_{name}\n" in next(TASK_FOLDER.rglob(f"{name}.yaml")).read_text(encoding="utf-8")


def test_items(data_dir: Path) -> None:  # noqa: F811
    text, letter, generated, number, chinese = load_tasks(
        ["arc_easy", "arc_easy_letter", "arc_easy_generate", "gsm8k_generate", "ceval_letter"], str(data_dir)
    )
    item, row = text.items[1], choice_rows()[1]
    assert item.prompt == f"Question: {row['question']}\nAnswer:"
    assert item.choices == tuple(f" {choice}" for choice in row["choices"])
    assert (item.answer, item.id, item.subject, item.question) == (1, "q1", "subject 1", row["question"])
    assert not text.is_generation
    assert letter.items[0].choices == (" A", " B")
    assert f"A. {choice_rows()[0]['choices'][0]}\nB. " in letter.items[0].prompt
    assert generated.is_generation
    assert (generated.items[1].answer, generated.items[1].choices) == ("B", ())
    assert generated.max_new_tokens == 64
    assert number.items[2].answer == "4"
    assert chinese.items[0].prompt.startswith("题目：")
    assert chinese.items[0].choices == ("A", "B")


def test_a_context_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    row = {"id": "long-0", "question": "Who rows?", "answers": ["Ada", "Ada L."], "context": "Ada rows. " * 50}
    write_rows(tmp_path / "longbench" / "test.jsonl", [row])
    (task,) = load_tasks(["longbench_generate"], str(tmp_path))
    (item,) = task.items
    assert task.is_generation
    assert item.prompt.startswith("Answer this question")
    assert item.prompt.endswith("Question: Who rows?\nAnswer:")
    assert item.context == row["context"]
    assert item.answer == "Ada"


def test_a_limit_draws_the_same_items(data_dir: Path) -> None:  # noqa: F811
    drawn = [load_tasks(["arc_easy"], str(data_dir), limit=3, seed=seed)[0] for seed in (0, 0, 1)]
    ids = [[item.id for item in task.items] for task in drawn]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 3
    assert drawn[0].items[0].seed(0) != drawn[0].items[1].seed(0)


def test_mismatched_items_are_other_questions_of_similar_length(data_dir: Path) -> None:  # noqa: F811
    repeated = [*choice_rows(), {**choice_rows()[0], "id": "again"}]
    write_rows(data_dir / "arc_easy" / "test.jsonl", repeated)
    (task,) = load_tasks(["arc_easy"], str(data_dir))
    mismatched = task.mismatched_items()
    assert len(mismatched) == len(repeated)
    assert all(mismatched[item.id].prompt != item.prompt for item in task.items)
    write_rows(data_dir / "arc_easy" / "test.jsonl", repeated[:1])
    with pytest.raises(ValueError, match="at least two different questions"):
        load_tasks(["arc_easy"], str(data_dir))[0].mismatched_items()


def test_compressed_data(data_dir: Path) -> None:  # noqa: F811
    plain = data_dir / "arc_easy" / "test.jsonl"
    packed = plain.with_name("test.jsonl.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    before = load("arc_easy", str(data_dir))["test"].to_list()
    plain.unlink()
    assert load("arc_easy", str(data_dir))["test"].to_list() == before


def test_damaged_data(data_dir: Path) -> None:  # noqa: F811
    path = data_dir / "arc_easy" / "test.jsonl"
    rows = choice_rows(2)
    with pytest.raises(ValueError, match=r"`tasks` must be among \['arc_challenge'.*but got \['arc_hard'\]"):
        load_tasks(["arc_hard"], str(data_dir))
    with pytest.raises(FileNotFoundError, match=r"openbookqa/test\.jsonl' \(or the same with \.gz\)"):
        load("openbookqa", str(data_dir))
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:30], encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2 is not JSON")):
        load("arc_easy", str(data_dir))
    write_rows(path, [{"id": "1", "query": "?", "choices": ["a"], "answer": 0}])
    with pytest.raises(ValueError, match=r"line 1 lacks \['question'\]; a row needs"):
        load("arc_easy", str(data_dir))
    for answer in (2, "B", -1):
        write_rows(path, [{**rows[0], "answer": answer}])
        with pytest.raises(
            ValueError, match=f"line 1: `answer` must be an index into the 2 `choices`, but is {answer!r}"
        ):
            load("arc_easy", str(data_dir))
