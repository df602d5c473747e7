"""The command line: what each command prints, and errors as one sentence."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import randomize_fuser, save_tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoModelForCausalLM

import c2c_hf
from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.cli.main import main

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
        "import sys\nfrom c2c_hf.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(c2c_hf.__file__).parent.parent)}
    for arguments in (["--help"], ["generate", "--help"]):
        seconds = []
        # The best of three: other work on the machine is not what is measured.
        for _ in range(3):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=60, env=environment
            )
            seconds.append(time.perf_counter() - start)
        assert "usage: c2c" in done.stdout, done.stderr
        assert done.stdout.strip().endswith("False False")
        assert min(seconds) < 1.0


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


def test_fused_answers_are_those_of_the_library(
    folders: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(folders[2], tmp_path / "open")
    model, processor = C2CForCausalLM.from_pretrained(tmp_path / "open"), C2CProcessor.from_pretrained(folders[2])
    randomize_fuser(model, seed=0).save_pretrained(tmp_path / "open")
    inputs = processor("Rivers end in", sharer_context="A note.", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(out, skip_special_tokens=True)
    arguments = ["generate", "--model", str(tmp_path / "open"), "--max-new-tokens", "6", "--plain", "Rivers end in"]
    assert main([*arguments, "--context", "A note."]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    own = model.receiver.generate(input_ids=inputs["input_ids"], max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    alone = processor.tokenizer.decode(own, skip_special_tokens=True)
    assert alone != expected, "fusion changes nothing, so nothing was compared"
    assert main([*arguments, "--context", "A note.", "--alone"]) == 0
    assert capsys.readouterr().out == f"{alone}\n"


@pytest.mark.parametrize("end", ["\n", ""], ids=["empty line", "end of file"])
def test_chat(
    folders: tuple[str, str, str], end: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every turn is asked with all those before it."""
    asked = []
    apply = C2CProcessor.apply_chat_template
    monkeypatch.setattr(
        C2CProcessor,
        "apply_chat_template",
        lambda self, messages, **kwargs: asked.append([dict(m) for m in messages]) or apply(self, messages, **kwargs),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\n  And now? \n{end}"))
    assert main(["chat", "--model", folders[2], "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("> ") == 3
    first, second = asked
    assert first == [{"role": "user", "content": "Hello"}]
    assert second[0] == first[0]
    assert second[1]["role"] == "assistant"
    assert second[1]["content"].strip() in printed
    assert second[2] == {"role": "user", "content": "And now?"}


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = PARITY / "checkpoints" / "qwen3_from_llama"
    assert main(["convert", str(checkpoint), "--output", str(tmp_path / "fuser")]) == 0
    printed = capsys.readouterr()
    assert f"to {tmp_path / 'fuser'}." in printed.out
    assert "No processor saved, because the tokenizers could not be loaded" in printed.err
    model = C2CForCausalLM.from_pretrained(tmp_path / "fuser")
    assert model.fuser[0].is_open()


def test_convert_saves_a_processor_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(PARITY / "models", tmp_path / "models")
    shutil.copytree(PARITY / "checkpoints" / "qwen3_from_llama", tmp_path / "checkpoints" / "one")
    for name in ("qwen3-tiny", "llama-tiny"):
        byte_level_tokenizer(300).save_pretrained(tmp_path / "models" / name)
    checkpoint, output = str(tmp_path / "checkpoints" / "one"), str(tmp_path / "fuser")
    receiver, sharer = (str(tmp_path / "models" / name) for name in ("qwen3-tiny", "llama-tiny"))
    for name, model in (("qwen3-tiny", receiver), ("llama-tiny", sharer)):
        # Enough embeddings for the tokenizer.
        grown = AutoModelForCausalLM.from_pretrained(PARITY / "models" / name)
        grown.resize_token_embeddings(300)
        grown.save_pretrained(model)
    assert main(["convert", checkpoint, "--output", output, "--receiver", receiver, "--sharer", sharer]) == 0
    assert "No processor saved" not in capsys.readouterr().err
    model, processor = C2CForCausalLM.from_pretrained(output), C2CProcessor.from_pretrained(output)
    assert model.config.receiver_name_or_path == receiver
    assert processor.token_alignments == model.config.token_alignments == ["identity"]
    assert main(["generate", "--model", output, "--max-new-tokens", "2", "Hello"]) == 0


def test_analyze(folders: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sacrebleu", reason="the report's BLEU needs sacrebleu (extra `[eval]`)")
    text = tmp_path / "text.txt"
    text.write_text("The sharer reads the text.\n\nRivers end in the sea.\n", encoding="utf-8")
    assert main(["analyze", folders[0], folders[1], str(text)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["token_alignment"] == "span"
    assert any(0.9 < value <= 1 for value in report.values() if isinstance(value, float))


def one_error(error: str, command: str) -> str:
    """The last line, which is the only one that is not a progress bar or a note."""
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip()]
    own = [line for line in lines if not re.search(r"%\||untrained and closed", line)]
    assert len(own) == 1, own
    assert own[0].startswith(f"c2c {command}: ")
    return own[0].removeprefix(f"c2c {command}: ")


ERRORS = {
    "both": (["generate", "--model", "FUSER", "--token-alignment", "first", "Hi"], "a saved fuser records its own"),
    "half": (["generate", "--receiver", "RECEIVER", "Hi"], "give `--model`, or both `--receiver` and `--sharer`."),
    "gone": (["generate", "--receiver", "RECEIVER", "--sharer", "/nowhere", "Hi"], "'/nowhere' does not exist"),
    "identity": (
        ["generate", "--receiver", "RECEIVER", "--sharer", "SHARER", "--token-alignment", "identity", "Hi"],
        "`token_alignment='identity'` needs receiver and sharer to have the same vocabulary",
    ),
    "context": (
        ["generate", "--receiver", "RECEIVER", "--sharer", "SHARER", "--token-alignment", "first"]
        + ["--context", "A note.", "Hi"],
        "`sharer_context` needs `token_alignment='span'`",
    ),
    "empty": (["generate", "--model", "FUSER", "--plain", ""], "give a text that is not empty"),
    "long": (["generate", "--model", "FUSER", "--plain", "ship " * 300], "reads at most 256; shorten it"),
    "device": (["generate", "--model", "FUSER", "--device", "nonsense", "Hi"], "device"),
    "template": (
        ["chat", "--receiver", "SHARER", "--sharer", "RECEIVER"],
        "the receiver has no chat template; use `c2c generate --plain`.",
    ),
    "checkpoints": (
        ["convert", str(PARITY / "checkpoints" / "qwen3_from_llama"), "--output", "/nowhere"]
        + ["--sharer", "RECEIVER", "--sharer", "SHARER"],
        "`sharers` must be as many as `checkpoint_dirs` (1), but got 2.",
    ),
    "no text": (["analyze", "RECEIVER", "SHARER", "EMPTY"], "holds no text."),
    "no file": (["analyze", "RECEIVER", "SHARER", "/nowhere/text.txt"], "/nowhere/text.txt"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_came(
    name: str, folders: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    places = dict(zip(("RECEIVER", "SHARER", "FUSER"), folders, strict=True), EMPTY=str(tmp_path / "empty.txt"))
    arguments, message = ERRORS[name]
    assert main([places.get(word, word) for word in arguments]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert message in one_error(printed.err, arguments[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_no_gpu_is_one_sentence(folders: tuple[str, str, str], capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "--model", folders[2], "--device", "cuda", "Hi"]) == 1
    assert "CUDA" in one_error(capsys.readouterr().err, "generate")


@pytest.mark.parametrize("number", ["0", "-2", "many"])
def test_numbers_are_checked_before_models_load(number: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--model", "/nowhere", "--max-new-tokens", number, "Hi"])
    assert "argument --max-new-tokens" in capsys.readouterr().err


def test_interruption_and_full_traces(folders: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give `--model`"):
        main(["--verbose", "generate", "Hi"])

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(C2CForCausalLM, "generate", interrupted)
    assert main(["generate", "--model", folders[2], "Hi"]) == 130


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
