"""The examples run, on tiny models, with the arguments that a user gives; in this process, which has all imports."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_tiny_model
from evaluation_for_tests import NEEDS, choice_rows, data_dir, save_fuser, write_rows  # noqa: F401
from safetensors.torch import load_file
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer

from c2c_hf.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    receiver = save_tiny_model(root / "receiver", "llama", byte_level_tokenizer())
    return receiver, save_tiny_model(root / "sharer", "gemma3", metaspace_tokenizer(), seed=1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return a function that runs an example and returns what it prints."""

    def run_example(name: str, *arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_generate(pair: tuple[str, str], run: Callable[..., str]) -> None:
    receiver, sharer = pair
    options = ["--receiver", receiver, "--sharer", sharer, "--max-new-tokens", 4]
    printed = run("generate.py", *options, "Where do rivers end?")
    answers = {}
    for part in printed.split("\n\n")[1:]:
        name, _, text = part.partition(":\n")
        answers[name.split(" (")[0]] = text.strip()
    assert set(answers) == {"receiver", "sharer", "C2C"}
    assert answers["C2C"] == answers["receiver"], "the gates of an untrained fuser are closed"


def test_fit_and_document_qa(
    pair: tuple[str, str], tmp_path: Path, run: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    """`c2c fit` and then questions about a document that the sharer prefills once."""
    receiver, sharer = pair
    rows = [json.dumps({"text": " ".join(TEXT[(i + j) % 5] for j in range(3))}) for i in range(100)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    fuser, document = str(tmp_path / "memory"), tmp_path / "document.txt"
    command = ["fit", str(tmp_path / "texts.jsonl"), "--output", fuser]
    command += ["--receiver", receiver, "--sharer", sharer, "--source-layers", "2", "--max-length", "40"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "R2 on" in printed and "from the sharer's layers" in printed
    document.write_text(TEXT[0], encoding="utf-8")
    question = [fuser, document, "How many ships?", "--max-new-tokens", 4]
    first, second = (run("document_qa.py", *question) for _ in range(2))
    assert (tmp_path / "document.cache.safetensors").is_file()
    assert "The sharer prefilled" in first and "The sharer prefilled" not in second
    assert first.split(")\n")[-1] == second.split(")\n")[-1]


def test_domain_transfer(tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a domain, from the rows of its subjects."""
    pytest.importorskip("lm_eval", reason=NEEDS)
    fuser = save_fuser(tmp_path, "fuser")
    subjects = ["anatomy", "professional_law", "machine_learning", "astronomy"]
    rows = [{**row, "subject": subjects[index % 4]} for index, row in enumerate(choice_rows(12))]
    write_rows(tmp_path / "data" / "mmlu_redux" / "test.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    printed = run("domain_transfer.py", fuser, "--data-dir", tmp_path / "data")
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][2:]
    assert [row[:2] for row in rows] == [["| medicine", "3"], ["| law", "3"], ["| computing", "3"]]


# PEFT asks for the name that transformers 5.24 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_knowledge(pair: tuple[str, str], tmp_path: Path, run: Callable[..., str]) -> None:
    """Teach, train with the LoRA and the self control, test; called again it trains nothing and prints the same."""
    receiver, sharer = pair
    command = [tmp_path, "--receiver", receiver, "--sharer", sharer, "--dtype", "float32"]
    command += ["--people", "210", "--train-people", "204", "--controls"]
    command += ["--teach-passes", "1", "--teach-batch-size", "210", "--steps", "2", "--batch-size", "4"]
    command += ["--hidden-size", "8", "--limit", "4", "--layer-alignment", "learned"]
    first, second = (run("knowledge.py", *command) for _ in range(2))
    rows = [line.split(" | ")[0].strip("| ") for line in first.splitlines() if line.startswith("|")]
    assert rows[0] == "4 questions, % right"
    methods = ["receiver", "sharer", "c2c", "mismatched", "shuffled", "zero", "receiver_with_adapter"]
    assert rows[2:] == [*methods, "receiver_as_sharer", "c2c, untaught sharer"]
    taught, untaught = (load_file(folder / "model.safetensors") for folder in (tmp_path / "taught", Path(sharer)))
    changed = {name for name, value in taught.items() if not value.equal(untaught[name].bfloat16())}
    assert changed == {name for name in taught if name.endswith("_proj.weight")}, "the LoRA is merged"
    assert second.splitlines()[-len(rows) :] == first.splitlines()[-len(rows) :]
    assert "train_runtime" not in second


def test_benchmark_serving(tmp_path: Path, run: Callable[..., str]) -> None:
    for package in ("fastapi", "httpx", "psutil"):
        pytest.importorskip(package, reason="the server needs the extras `[serve]` and `[test]`")
    options = ["--clients", 4, "--requests", 8, "--max-tokens", 2, "--max-batch", 4]
    *_, row = run("benchmark_serving.py", save_fuser(tmp_path, "fuser"), *options).splitlines()
    assert row.startswith("| 4 | ") and " | 8 of 8 | " in row


def test_passage_data(tmp_path: Path, run: Callable[..., str]) -> None:
    """Questions on passages and chats with one, without those that share text with a test set."""
    passages = [" ".join(f"{letter}{i}" for i in range(30)) for letter in "abcd"]
    questions = [
        {"context": text, "question": f"{n}?", "answers": [text[:2]]} for text in passages[:3] for n in (1, 2)
    ]
    message, answer = {"role": "user", "content": f"Who?\n\n{passages[3]}"}, {"role": "assistant", "content": "d0"}
    for name, rows in (
        ("questions", questions),
        ("chats", [{"messages": [message, answer]}]),
        ("tests", [{"context": f"x {passages[1][9:]}", "question": "?", "answers": ["x"]}]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("questions", "chats", "tests")]
    options = ["--exclude", files[2], "--min-characters", 20]
    assert "2 of 3 passages share no text" in run("passage_data.py", tmp_path / "data", *files[:2], *options)
    lines = {
        name: (tmp_path / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("questions", "texts")
    }
    kept = [passages[0], passages[2], passages[3]]
    assert sorted(json.loads(line)["text"] for line in lines["texts"]) == kept
    rows = [json.loads(line) for line in lines["questions"]]
    assert sorted((row["context"][:2], row["question"]) for row in rows) == [
        *(("a0", "1?"), ("a0", "2?"), ("c0", "1?"), ("c0", "2?"), ("d0", "Who?")),
    ]
