"""The command line: what each command prints, and errors as one sentence."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import save_tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.cli import main

PARITY = Path(__file__).parent / "data" / "parity"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A receiver, a sharer and a fuser between them, each with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    receiver = save_tiny_model(root / "receiver", "llama", byte_level_tokenizer())
    sharer = save_tiny_model(root / "sharer", "qwen3", metaspace_tokenizer(), seed=1)
    fuser = str(root / "fuser")
    C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, fuser_hidden_size=8).save_pretrained(fuser)
    C2CProcessor.from_receiver_and_sharers(receiver, sharer).save_pretrained(fuser)
    return receiver, sharer, fuser


def test_help_is_quick(tmp_path: Path) -> None:
    """As installed: a script named `c2c`. No torch, no transformers."""
    script = tmp_path / "c2c"
    script.write_text(
        "import sys\nfrom c2c_hf.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - start
    assert "usage: c2c" in done.stdout
    assert done.stdout.strip().endswith("False False")
    assert seconds < 1.0


def test_generate(folders: tuple[str, str, str], capsys: pytest.CaptureFixture) -> None:
    receiver, sharer, fuser = folders
    assert main(["generate", "--model", fuser, "--max-new-tokens", "4", "Where do rivers end?", "Why?"]) == 0
    fused = capsys.readouterr().out
    assert (
        main(["generate", "--model", fuser, "--alone", "--max-new-tokens", "4", "Where do rivers end?", "Why?"]) == 0
    )
    assert capsys.readouterr().out == fused, "an untrained fuser is shut"
    untrained = ["generate", "--receiver", receiver, "--sharer", sharer, "--max-new-tokens", "4", "--plain"]
    assert main([*untrained, "--context", "A note.", "Rivers end in"]) == 0
    assert "untrained and closed" in capsys.readouterr().err


def test_chat(folders: tuple[str, str, str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hello", "And now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "--model", folders[2], "--max-new-tokens", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = PARITY / "checkpoints" / "qwen3_from_llama"
    assert main(["convert", str(checkpoint), "--output", str(tmp_path / "fuser")]) == 0
    printed = capsys.readouterr()
    assert f"to {tmp_path / 'fuser'}." in printed.out
    assert "No processor saved, because the tokenizers could not be loaded" in printed.err
    model = C2CForCausalLM.from_pretrained(tmp_path / "fuser")
    assert model.fuser[0].is_open()


def test_analyze(folders: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sacrebleu", reason="the report's BLEU needs sacrebleu (extra `[eval]`)")
    text = tmp_path / "text.txt"
    text.write_text("The sharer reads the text.\n\nRivers end in the sea.\n", encoding="utf-8")
    assert main(["analyze", folders[0], folders[1], str(text)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["token_alignment"] == "span"
    assert any(0.9 < value <= 1 for value in report.values() if isinstance(value, float))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "Hi"], "give `--model`, or both `--receiver` and `--sharer`."),
        (["generate", "--model", "/nowhere/fuser", "Hi"], "/nowhere/fuser"),
        (["convert", "/nowhere/checkpoint", "--output", "/nowhere/out"], "config.json is missing or no JSON file"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
