"""The command line: what each command prints, and errors as one sentence."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize_fuser, save_tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoModelForCausalLM

import c2c_hf
from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.cli.main import main, repeat_options

PARITY = Path(__file__).parents[1] / "data" / "parity"


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


def cpu_seconds() -> float:
    """Of all child processes so far: what other work on the machine takes does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


SCRIPT = (
    "import sys\nfrom c2c_hf.cli.main import main\nstatus = main()\n"
    "print('torch' in sys.modules, 'transformers' in sys.modules)\nsys.exit(status)\n"
)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["evaluate", "--help"]], ids=" ".join)
def test_help_is_quick(arguments: list[str], tmp_path: Path) -> None:
    """As installed, a script named `c2c`: no torch, no transformers, under a second; also as `python -m c2c_hf`."""
    script = tmp_path / "c2c"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(c2c_hf.__file__).parent.parent)}
    options = {"capture_output": True, "text": True, "timeout": 120, "env": environment}
    start = cpu_seconds()
    done = subprocess.run([sys.executable, str(script), *arguments], **options)
    assert "Usage: c2c" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("False False")
    assert cpu_seconds() - start < 1.0
    start = cpu_seconds()
    done = subprocess.run([sys.executable, "-m", "c2c_hf", *arguments], **options)
    assert done.returncode == 0 and "Usage: c2c" in done.stdout, done.stderr
    assert cpu_seconds() - start < 1.5


def test_help_is_grouped(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    groups: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if title := re.match(r"╭─ (\w+) ─", line):
            groups[title[1]] = []
        elif command := re.match(r"│ ([a-z][\w-]*) ", line):
            groups[list(groups)[-1]].append(command[1])
    assert groups == {
        "Options": [],
        "Answer": ["demo", "generate", "chat", "serve", "prefill"],
        "Train": ["train", "fit"],
        "Evaluate": ["evaluate", "lm-eval", "analyze"],
        "Share": ["convert", "inspect", "push"],
    }


@pytest.mark.parametrize(
    ("words", "completed"), [("c2c ser", ["serve"]), ("c2c inspect --rev", ["--revision"]), ("c2c nothing", [])]
)
def test_shell_completion(words: str, completed: list[str], tmp_path: Path) -> None:
    """As bash asks for it; quick, since it waits for every key."""
    script = tmp_path / "c2c"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(c2c_hf.__file__).parent.parent)}
    environment |= {"_C2C_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    start = cpu_seconds()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split() == completed
    assert cpu_seconds() - start < 1.0


def test_options_with_many_values() -> None:
    words = ["evaluate", "fuser", "--tasks", "a", "b", "--limit", "3", "--methods", "c", "--seed", "1", "--tasks", "d"]
    assert repeat_options(words, ("--tasks", "--methods")) == [
        *("evaluate", "fuser", "--tasks", "a", "--tasks", "b", "--limit", "3"),
        *("--methods", "c", "--seed", "1", "--tasks", "d"),
    ]


def test_generate(folders: tuple[str, str, str], capsys: pytest.CaptureFixture) -> None:
    receiver, sharer, fuser = folders
    assert main(["generate", "--model", fuser, "--max-new-tokens", "4", "Where do rivers end?", "Why?"]) == 0
    fused = capsys.readouterr().out
    words = ["generate", "--model", fuser, "--no-fusion", "--max-new-tokens", "4", "Where do rivers end?", "Why?"]
    assert main(words) == 0
    assert capsys.readouterr().out == fused, "the gates of an untrained fuser are closed"
    assert main([*words, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == words[-2:] and {row["answer_tokens"] for row in rows} == {4}
    assert "".join(f"{row['answer']}\n" for row in rows) == fused
    untrained = ["generate", "--receiver", receiver, "--sharer", sharer, "--max-new-tokens", "4", "--plain"]
    assert main([*untrained, "--context", "A note.", "Rivers end in"]) == 0
    assert "untrained, its gates are closed" in capsys.readouterr().err


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
    unfused = processor.tokenizer.decode(own, skip_special_tokens=True)
    assert unfused != expected, "fusion changes nothing, so nothing was compared"
    assert main([*arguments, "--context", "A note.", "--no-fusion"]) == 0
    assert capsys.readouterr().out == f"{unfused}\n"


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
    assert model.fuser[0].parts(1, torch.float32)


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


def test_analyze_tokenizers(folders: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sacrebleu", reason="the report's BLEU needs sacrebleu (extra `[eval]`)")
    text = tmp_path / "text.txt"
    text.write_text("The sharer prefills the text.\n\nRivers end in the sea.\n", encoding="utf-8")
    assert main(["analyze", "tokenizers", folders[0], folders[1], str(text)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["token_alignment"] == "span"
    assert any(0.9 < value <= 1 for value in report.values() if isinstance(value, float))
    assert (report["failures"], report["num_failures"]) == ([], 0)
    (tmp_path / "text.jsonl").write_text('{"words": "ß"}\n', encoding="utf-8")
    words = ["analyze", "tokenizers", folders[0], folders[1], str(tmp_path / "text.jsonl"), "--column", "words"]
    assert main([*words, "--token-alignment", "first", "--failures", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    (failure,) = report["failures"]
    assert report["num_failures"] == 2, "two halves of a character"
    assert failure["reason"] == "no counterpart" and failure["context"] == "ß"


def test_analyze_fuser_and_privacy(
    folders: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("sklearn", reason="the analysis needs scikit-learn (extra `[analysis]`)")
    receiver, sharer, _ = folders
    fuser, output = str(tmp_path / "memory"), tmp_path / "report"
    C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, mode="memory").save_pretrained(fuser)
    C2CProcessor.from_receiver_and_sharers(receiver, sharer, mode="memory").save_pretrained(fuser)
    texts = {name: tmp_path / f"{name}.txt" for name in ("train", "test")}
    texts["train"].write_text("The keeper counted ships.\nParis is short.\n", encoding="utf-8")
    texts["test"].write_text("The capital of France is Paris.\n", encoding="utf-8")
    assert main(["analyze", "fuser", fuser, "--texts", str(texts["train"]), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"The page is {output / 'index.html'}.\n"
    assert json.loads((output / "report.json").read_text(encoding="utf-8"))["fuser"] == "memory"
    files = ["--train", str(texts["train"]), "--test", str(texts["test"]), "--output", str(tmp_path / "privacy.json")]
    assert main(["analyze", "privacy", fuser, *files, "--layers", "1", "--payload", "fuser"]) == 0
    printed = capsys.readouterr().out
    assert "| memory slots | 0 | " in printed and "sharer cache" not in printed
    assert [own["payload"] for own in json.loads((tmp_path / "privacy.json").read_text(encoding="utf-8"))] == [
        *("memory slots", "mismatched memory slots", "frequency"),
    ]


def one_error(error: str, command: str) -> str:
    """The last line, which is the only one that is not a progress bar or a note."""
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip()]
    own = [line for line in lines if not re.search(r"%\||untrained, its gates", line)]
    assert len(own) == 1, own
    assert own[0].startswith(f"c2c {command}: ")
    return own[0].removeprefix(f"c2c {command}: ")


ERRORS = {
    "both": (["generate", "--model", "FUSER", "--token-alignment", "first", "Hi"], "a saved fuser records its own"),
    "half": (["generate", "--receiver", "RECEIVER", "Hi"], "name a fuser, or both `--receiver` and `--sharer`."),
    "gone": (
        ["generate", "--receiver", "RECEIVER", "--sharer", "/nowhere/at/all", "Hi"],
        "`--sharer`: the folder '/nowhere/at/all' does not exist.",
    ),
    "no fuser": (["chat", "--model", "./my/own/fuser"], "the fuser: the folder './my/own/fuser' does not exist."),
    "no such fuser": (["inspect", "/nowhere/fuser"], "the fuser: the folder '/nowhere/fuser' does not exist."),
    "no run": (["evaluate", "/nowhere/fuser"], "the fuser: the folder '/nowhere/fuser' does not exist."),
    "no folder to push": (["push", "/nowhere/fuser", "me/fuser"], "the folder '/nowhere/fuser' does not exist."),
    "no checkpoint": (["convert", "/nowhere/one", "--output", "out"], "the checkpoint folder '/nowhere/one' does not"),
    "no model to fit": (
        ["fit", "texts.jsonl", "--output", "out", "--receiver", "/no/r", "--sharer", "/no/s"],
        "`--receiver`: the folder '/no/r' does not exist.",
    ),
    "no tokenizer": (
        ["analyze", "tokenizers", "/no/r", "SHARER", "TEXT"],
        "the receiver: the folder '/no/r' does not exist.",
    ),
    "no JSON": (
        ["evaluate", "FUSER", "--tasks", "arc_easy", "--chat-template-kwargs", "{"],
        "`--chat-template-kwargs` is not JSON",
    ),
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
    "long": (["generate", "--model", "FUSER", "--plain", "ship " * 300], "is 256; shorten it"),
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
    "no text": (["analyze", "tokenizers", "RECEIVER", "SHARER", "EMPTY"], "holds no text."),
    "no file": (["analyze", "tokenizers", "RECEIVER", "SHARER", "/nowhere/text.txt"], "/nowhere/text.txt"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_came(
    name: str, folders: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "text.txt").write_text("A text.\n")
    places = dict(zip(("RECEIVER", "SHARER", "FUSER"), folders, strict=True))
    places |= {"EMPTY": str(tmp_path / "empty.txt"), "TEXT": str(tmp_path / "text.txt")}
    arguments, message = ERRORS[name]
    assert main([places.get(word, word) for word in arguments]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert message in one_error(printed.err, arguments[0])


CHAT = '{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": "ho"}]}\n'
RECIPE = "receiver: RECEIVER\nsharers: [SHARER]\noutput_dir: out\nmax_steps: 1\nreport_to: none\nuse_cpu: true\n"
RECIPES = {
    "broken YAML": ("receiver: a\n  bad: [\n", "recipe.yaml' is not YAML: mapping values are not allowed here"),
    "tab in YAML": ("\treceiver: a\n", "recipe.yaml' is not YAML: while scanning for the next token"),
    "unknown dtype": (f"{RECIPE}train_data: [good.jsonl]\ndtype: float99\n", "but got 'float99'."),
    "part without text": (f"{RECIPE}train_data: [part.jsonl]\n", "part.jsonl"),
    "content is a number": (f"{RECIPE}train_data: [number.jsonl]\n", "number.jsonl"),
    "no data": (f"{RECIPE}train_data: [gone.jsonl]\n", "'gone.jsonl' does not exist"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_errors_of_recipes_and_data_are_one_sentence(
    name: str,
    folders: tuple[str, str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the file, and of data the row."""
    monkeypatch.chdir(tmp_path)
    for file, content in (("good", '"hi"'), ("part", '[{"type": "text"}]'), ("number", "5")):
        Path(f"{file}.jsonl").write_text(CHAT % '"hi"' + CHAT % content)
    recipe, message = RECIPES[name]
    Path("recipe.yaml").write_text(recipe.replace("RECEIVER", folders[0]).replace("SHARER", folders[1]))
    assert main(["train", "recipe.yaml"]) == 1
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert error.startswith("c2c train: ") and message in error
    assert "Error:" not in error, "raised for what the user gave, not for a fault"
    if name in ("part without text", "content is a number"):
        assert re.search(r"\b(row|Row) 2\b", error)


@pytest.mark.parametrize("name", ["general", "memory"])
def test_shipped_fusers_are_inspected_by_name(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", name]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^receiver +HuggingFaceTB/SmolLM2-135M-Instruct", printed, flags=re.MULTILINE)
    assert re.search(r"^sharer 0 +google/gemma-3-270m", printed, flags=re.MULTILINE)
    assert main(["inspect", name, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert [f"{label:<16} {text}" for label, text in described.items()] == printed.splitlines()


@pytest.mark.real_pair
@pytest.mark.parametrize("name", ["general", "memory"])
def test_shipped_fusers_answer_by_name(name: str, real_pair: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    """Also with a base model in place of the recorded one."""
    words = ["generate", "--model", name, "--max-new-tokens", "2", "Where do rivers end?"]
    assert main(words) == 0
    answer = capsys.readouterr().out
    assert answer.strip()
    assert main([*words, "--receiver", real_pair[0]]) == 0
    assert capsys.readouterr().out == answer


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_no_gpu_is_one_sentence(folders: tuple[str, str, str], capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "--model", folders[2], "--device", "cuda", "Hi"]) == 1
    assert "CUDA" in one_error(capsys.readouterr().err, "generate")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (["generate", "--model", "/nowhere", "--max-new-tokens", number, "Hi"], "'--max-new-tokens'")
            for number in ("0", "-2", "many")
        ),
        (["generate"], "PROMPT"),
        (["generate", "--alone", "Hi"], "--alone"),
        (["generate", "--dtype", "float99", "Hi"], "'--dtype'"),
        (["fit", "texts.jsonl"], "'--output'"),
        (["telepathy"], "'telepathy'"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    """Before any model loads."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert message in one_error(printed.err, arguments[0])


def test_interruption_and_full_traces(folders: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name a fuser"):
        main(["--verbose", "generate", "Hi"])

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(C2CForCausalLM, "generate", interrupted)
    assert main(["generate", "--model", folders[2], "Hi"]) == 130


def test_faults_are_one_sentence_that_says_so(
    folders: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("the shapes\ndo not fit")

    monkeypatch.setattr(C2CForCausalLM, "generate", fail)
    assert main(["generate", "--model", folders[2], "Hi"]) == 1
    error = one_error(capsys.readouterr().err, "generate")
    assert error == "RuntimeError: the shapes do not fit (`c2c --verbose generate ...` shows where)"
