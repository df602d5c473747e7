"""`kill -9` at twenty moments of a save, a conversion and a checkpoint: what is there is whole, and litter goes."""

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import randomize_fuser, tiny_c2c, tiny_model
from safetensors.torch import load_file
from training_for_tests import make_trainer
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from c2c_hf import C2CForCausalLM
from c2c_hf.demo import pypi_pair

KILLS = 20
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked, which this system lacks"
)


def run_and_kill(action: Callable[[], object], folder: Path, moment: int | None) -> int:
    """Run `action` in a process that is killed before its file operation number `moment` in `folder`.

    Returns:
        The number of operations where nothing is killed, else 0.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count, code = 0, 1

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            # Removals of a tree name their paths relative to its folders.
            if event in EVENTS and (event in EVENTS[3:] or any(str(folder) in str(arg) for arg in args[:2])):
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        try:
            # Threads of the parent are not here.
            torch.set_num_threads(1)
            sys.addaudithook(hook)
            action()
            os.write(writer, str(count).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (0 if moment is None else -signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        return int(pipe.read() or 0)


def kill_everywhere(action: Callable[[], object], folder: Path, check: Callable[[], None]) -> None:
    """Kill at moments all over the action, each on the same folder; then let it end, and look for litter."""
    before = folder.parent / "before"
    shutil.copytree(folder, before)

    def restore() -> None:
        shutil.rmtree(folder)
        shutil.copytree(before, folder)

    total = run_and_kill(action, folder, None)
    expected = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert total >= 5
    for moment in sorted({number * total // KILLS for number in range(KILLS)}):
        restore()
        run_and_kill(action, folder, moment)
        check()
        run_and_kill(action, folder, None)
        assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) == expected


def test_saving(tmp_path: Path) -> None:
    """The earlier fuser or the new one; for a few renames no `config.json`, by which the folder is incomplete."""
    model, folder = tiny_c2c(), tmp_path / "run" / "fuser"
    models = [model.receiver, *model.sharers]
    model.save_pretrained(folder)
    randomize_fuser(model, 77)
    versions = [
        load_file(folder / "model.safetensors"),
        {f"fuser.{k}": v for k, v in model.fuser.state_dict().items()},
    ]
    num_incomplete = 0

    def check() -> None:
        nonlocal num_incomplete
        if not (folder / "config.json").is_file():
            num_incomplete += 1
            with pytest.raises(ValueError, match="is no saved fuser"):
                C2CForCausalLM.from_pretrained(folder, receiver=models[0], sharers=models[1:])
            return
        found = load_file(folder / "model.safetensors")
        assert any(all(torch.equal(found[name], own[name]) for name in found) for own in versions)

    kill_everywhere(lambda: model.save_pretrained(folder), folder.parent, check)
    assert num_incomplete <= KILLS // 2


def test_converting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("C2C_HF_CACHE", str(cache))
    monkeypatch.setattr(pypi_pair, "_package_folder", lambda package: tmp_path)
    model = tiny_model("llama")
    folder = cache / f"tiny-v{pypi_pair.FORMAT_VERSION}"

    def convert() -> None:
        pypi_pair._converted("tiny", "package", lambda package, target: model.save_pretrained(target))

    def check() -> None:
        if folder.exists():
            loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())

    kill_everywhere(convert, cache, check)


def test_checkpointing(tmp_path: Path) -> None:
    """Also while the oldest checkpoint is removed: half of it is none."""
    trainer = make_trainer(tmp_path / "run", save_total_limit=2, max_steps=9)
    trainer.create_optimizer_and_scheduler(9)

    def save(step: int) -> None:
        trainer.state.global_step = step
        trainer._save_checkpoint(trainer.model, None)

    files = None
    for step in (10, 2):
        # The highest number is the oldest one here: it goes first, and it is the one to resume from while it is there.
        save(step)
        os.utime(tmp_path / "run" / f"checkpoint-{step}", (1000 * (12 - step), 1000 * (12 - step)))
    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}

    def check() -> None:
        checkpoint = get_last_checkpoint(str(tmp_path / "run"))
        assert checkpoint is not None
        for folder in (tmp_path / "run").glob("checkpoint-*"):
            assert {path.name for path in folder.iterdir()} == files, folder
        trainer._load_from_checkpoint(checkpoint)

    kill_everywhere(lambda: save(3), tmp_path / "run", check)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-3"]
