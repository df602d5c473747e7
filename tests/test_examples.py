"""The examples run, on tiny models, as a user starts them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    for seed, (name, tokenizer) in enumerate((("llama", byte_level_tokenizer()), ("gemma3", metaspace_tokenizer()))):
        config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict(), "vocab_size": len(tokenizer)})
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return str(root / "llama"), str(root / "gemma3")


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
