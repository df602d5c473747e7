"""The examples run, on tiny models, as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_tiny_model
from evaluation_for_tests import NEEDS, data_dir  # noqa: F401
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    receiver = save_tiny_model(root / "receiver", "llama", byte_level_tokenizer())
    return receiver, save_tiny_model(root / "sharer", "gemma3", metaspace_tokenizer(), seed=1)


def test_generate(pair: tuple[str, str]) -> None:
    receiver, sharer = pair
    command = [sys.executable, str(EXAMPLES / "generate.py"), "--receiver", receiver, "--sharer", sharer]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4", "Where do rivers end?"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {}
    for part in done.stdout.split("\n\n")[1:]:
        name, _, text = part.partition(":\n")
        answers[name.split(" (")[0]] = text.strip()
    assert set(answers) == {"receiver", "sharer", "C2C"}
    assert answers["C2C"] == answers["receiver"], "the gates of an untrained fuser are closed"


def test_fit_and_document_qa(pair: tuple[str, str], tmp_path: Path) -> None:
    """`c2c fit` and then questions about a document that the sharer prefills once."""
    receiver, sharer = pair
    rows = [json.dumps({"text": " ".join(TEXT[(i + j) % 5] for j in range(3))}) for i in range(100)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    fuser, document = str(tmp_path / "memory"), tmp_path / "document.txt"
    command = [sys.executable, "-m", "c2c_hf", "fit", str(tmp_path / "texts.jsonl"), "--output", fuser]
    command += ["--receiver", receiver, "--sharer", sharer, "--source-layers", "2", "--max-length", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "R2 on" in done.stdout and "from the sharer's layers" in done.stdout
    document.write_text(TEXT[0], encoding="utf-8")
    command = [sys.executable, str(EXAMPLES / "document_qa.py"), fuser, str(document), "How many ships?"]
    first, second = (
        subprocess.run([*command, "--max-new-tokens", "4"], capture_output=True, text=True, timeout=120)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr[-2000:]
    assert (tmp_path / "document.cache.safetensors").is_file()
    assert "The sharer prefilled" in first.stdout and "The sharer prefilled" not in second.stdout
    assert first.stdout.split(")\n")[-1] == second.stdout.split(")\n")[-1]


def test_knowledge(pair: tuple[str, str], tmp_path: Path) -> None:
    """Teach, train with the LoRA and the self control, test; called again it trains nothing and prints the same."""
    receiver, sharer = pair
    command = [sys.executable, str(EXAMPLES / "knowledge.py"), str(tmp_path), "--receiver", receiver]
    command += ["--sharer", sharer, "--dtype", "float32", "--people", "210", "--train-people", "204", "--controls"]
    command += ["--teach-passes", "1", "--teach-batch-size", "210", "--steps", "2", "--batch-size", "4"]
    command += ["--hidden-size", "8", "--limit", "4", "--layer-alignment", "learned"]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=600) for _ in range(2))
    assert first.returncode == 0, first.stderr[-2000:]
    rows = [line.split(" | ")[0].strip("| ") for line in first.stdout.splitlines() if line.startswith("|")]
    assert rows[0] == "4 questions, % right"
    methods = ["receiver", "sharer", "c2c", "mismatched", "shuffled", "zero", "receiver_with_adapter"]
    assert rows[2:] == [*methods, "receiver_as_sharer", "c2c, untaught sharer"]
    assert (tmp_path / "taught" / "model.safetensors").is_file()
    assert second.stdout.splitlines()[-len(rows) :] == first.stdout.splitlines()[-len(rows) :]
    assert "train_runtime" not in second.stdout


def test_passage_data(tmp_path: Path) -> None:
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
    command = [sys.executable, str(EXAMPLES / "passage_data.py"), str(tmp_path / "data"), *files[:2]]
    options = ["--exclude", files[2], "--min-characters", "20"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 of 3 passages share no text" in done.stdout
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
