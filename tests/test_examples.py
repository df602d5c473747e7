"""The examples run, on tiny models, as a user starts them."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


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
    assert set(answers) == {"receiver alone", "sharer alone", "C2C"}
    assert answers["C2C"] == answers["receiver alone"], "an untrained fuser is shut"


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name
