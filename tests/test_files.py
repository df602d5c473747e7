"""`write_file` and `staged_folder`: complete or unchanged, whatever fails, and no litter of killed processes."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from c2c_hf import _files
from c2c_hf._files import move_into_place, staged_folder, write_file

#: Greater than any process id that Linux gives.
DEAD_PID = 2**22 + 1
DAYS_AGO = time.time() - 3 * 24 * 3600


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replaces(name: str) -> bool:
    return name.startswith("model")


OLD = {"config.json": "old", "model-1.safetensors": "old", "model-2.safetensors": "old", "adapter/weights": "old"}
OTHERS = {"README.md": "mine", "notes/a.txt": "mine"}
NEW = {"config.json": "new", "model.safetensors": "new", "adapter/weights": "new", "adapter/more": "new"}


@pytest.mark.parametrize("data", [b"\x00\xff\r\n", "text \u00e9\r\n"])
def test_a_file_is_written_as_given(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    mode = path.stat().st_mode
    write_file(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode == mode


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_moved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(failure)):
        write_file(path, "new")
    assert contents(tmp_path) == {"file": "old"}


def test_threads_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [str(index) * 10_000 for index in range(8)]
    threads = [
        threading.Thread(target=lambda text=text: [write_file(path, text) for _ in range(20)]) for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_parts_of_killed_writes_go(tmp_path: Path) -> None:
    node = platform.node()
    running = f".file.{node}-{os.getpid()}-01234567.part"
    elsewhere = f".file.other-machine-{DEAD_PID}-01234567.part"
    fill(tmp_path, {f".file.{node}-{DEAD_PID}-01234567.part": "", running: "", elsewhere: "", ".file2.x.part": ""})
    write_file(tmp_path / "file", "new")
    assert set(contents(tmp_path)) == {"file", running, elsewhere, ".file2.x.part"}
    for name in (running, elsewhere):
        os.utime(tmp_path / name, (DAYS_AGO, DAYS_AGO))
    write_file(tmp_path / "file", "new")
    assert set(contents(tmp_path)) == {"file", ".file2.x.part"}


@pytest.mark.parametrize("place", ["folder", "new/parents/folder"])
def test_a_new_folder_appears_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    target, moves = tmp_path / place, []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (moves.append(paths), replace(*paths)))
    with staged_folder(target, replaces, "config.json") as staging:
        fill(staging, NEW)
        assert not target.exists()
    assert moves == [(staging, target)]
    assert contents(target) == NEW
    assert list(target.parent.iterdir()) == [target]
    # With the permissions of any other new folder, not those of a temporary one.
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_entries_replace_those_of_an_earlier_save(tmp_path: Path) -> None:
    fill(tmp_path, OLD | OTHERS)
    with staged_folder(tmp_path, replaces, "config.json") as staging:
        assert staging.parent == tmp_path
        fill(staging, NEW)
        assert {name: text for name, text in contents(tmp_path).items() if staging.name not in name} == OLD | OTHERS
    assert contents(tmp_path) == NEW | OTHERS
    assert not list(tmp_path.glob(".*"))


def test_without_a_rule_nothing_is_removed(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    with staged_folder(tmp_path) as staging:
        fill(staging, {"config.json": "new"})
    assert contents(tmp_path) == OLD | {"config.json": "new"}


def test_a_rule_that_takes_all_spares_other_saves(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    with staged_folder(tmp_path, lambda name: True) as one, staged_folder(tmp_path, lambda name: True) as two:
        fill(one, {"one": ""})
        fill(two, {"two": ""})
    assert contents(tmp_path) == {"one": ""}


def test_the_last_entry_goes_first_and_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, OLD)
    replace, moves = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *paths: (moves.append(paths), replace(*paths)))
    with staged_folder(tmp_path, replaces, "config.json") as staging:
        fill(staging, NEW)
    assert moves[0][0] == moves[-1][1] == tmp_path / "config.json"
    assert {path.name for _, path in moves[-3:]} == {"config.json", "model.safetensors", "adapter"}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_block_that_fails_changes_nothing(tmp_path: Path, existing: bool, failure: BaseException) -> None:
    target = tmp_path / "folder"
    before = OLD | OTHERS if existing else {}
    fill(target, before)
    with pytest.raises(type(failure)), staged_folder(target, replaces, "config.json") as staging:
        fill(staging, {"model.safetensors": "half"})
        raise failure
    assert contents(tmp_path) == {f"folder/{name}": text for name, text in before.items()}
    assert target.exists() == existing
    assert not list(tmp_path.rglob(".*"))


# Four entries go (three of them belong to the earlier save and one is replaced), then three come.
@pytest.mark.parametrize("failing", range(1, 8))
def test_a_move_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    fill(tmp_path, OLD | OTHERS)
    replace, moves = os.replace, []

    def replace_or_fail(*paths: Path) -> None:
        moves.append(paths)
        if len(moves) == failing:
            raise OSError("No space left on device")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_fail)
        with (
            pytest.raises(OSError, match="No space left"),
            staged_folder(tmp_path, replaces, "config.json") as staging,
        ):
            fill(staging, NEW)
    assert contents(tmp_path) == OLD | OTHERS
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("keep_existing", [True, False])
def test_a_folder_made_in_the_meantime(tmp_path: Path, keep_existing: bool) -> None:
    target = tmp_path / "folder"
    with staged_folder(target, keep_existing=keep_existing) as staging:
        fill(staging, {"config.json": "late"})
        fill(target, {"config.json": "first", "more": "first"})
    assert contents(target) == {"config.json": "first" if keep_existing else "late", "more": "first"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_made_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder"
    replace = os.replace

    def replace_later(*paths: Path) -> None:
        if paths[1] == target:
            fill(target, {"config.json": "first"})
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_later)
    with staged_folder(target, keep_existing=True) as staging:
        fill(staging, {"config.json": "late"})
    assert contents(tmp_path) == {"folder/config.json": "first"}


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(NotADirectoryError, match="file' is a file where a folder is needed"),
        staged_folder(tmp_path / "file"),
    ):
        pass
    assert contents(tmp_path) == {"file": "mine"}


def test_processes_that_fill_one_staging_folder(tmp_path: Path) -> None:
    fill(tmp_path, {"checkpoint-2/weights": "old", "checkpoint-4/weights": "old", ".incomplete/checkpoint-4/a": "new"})
    fill(tmp_path, {".incomplete/checkpoint-4/b": "new"})
    move_into_place(tmp_path / ".incomplete", tmp_path)
    assert contents(tmp_path) == {"checkpoint-2/weights": "old", "checkpoint-4/a": "new", "checkpoint-4/b": "new"}
    assert not (tmp_path / ".incomplete").exists()


KILLED = """
import runpy, sys
staged_folder = runpy.run_path(sys.argv[2])["staged_folder"]
with staged_folder(sys.argv[1], lambda name: name.startswith("model"), "config.json") as staging:
    (staging / "config.json").write_text("new")
    print(staging, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("existing", [True, False])
def test_staging_folders_of_killed_saves_go(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "folder"
    before = OLD if existing else {}
    fill(target, before)
    command = [sys.executable, "-c", KILLED, str(target), _files.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as running:
        left, kept = (Path(process.stdout.readline().strip()) for process in (killed, running))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.is_dir()
        assert {name: text for name, text in contents(target).items() if ".saving" not in name} == before
        with staged_folder(target, replaces, "config.json") as staging:
            fill(staging, NEW)
        assert not left.exists() and kept.is_dir(), "that of a running process stays"
        # Ends its block.
        running.stdin.close()
        assert running.wait() == 0
    without_weights = {name: text for name, text in NEW.items() if not replaces(name)}
    assert contents(target) == without_weights
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", [".saving-killed0", f".saving-other-machine-{DEAD_PID}-01234567"])
def test_old_staging_folders_of_unknown_processes_go(tmp_path: Path, name: str) -> None:
    fill(tmp_path, {f"{name}/model.safetensors": "half"})
    with staged_folder(tmp_path):
        pass
    assert (tmp_path / name).exists(), "it may be a save of another machine that is going on"
    os.utime(tmp_path / name, (DAYS_AGO, DAYS_AGO))
    with staged_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
