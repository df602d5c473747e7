"""Atomic writes: a file or a folder appears complete, or the previous content is unchanged."""

import contextlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_STAGING_PREFIX = ".saving-"
_OWNER = re.compile(r"(?P<host>.*)-(?P<pid>[0-9]+)-[0-9a-f]{8}")
#: Seconds without a change after which a staging folder is left over, even if its process may still be running.
_ABANDONED_AFTER = 24 * 3600


def write_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a file completely or not at all; several processes may write the same file at the same time.

    Temporary files of killed processes that wrote the same file are removed.

    Args:
        path: The file, in a folder that exists.
        data: Its content; text is encoded as UTF-8.

    Raises:
        OSError: The file cannot be written; what stood there before is unchanged.
    """
    path = Path(path)
    prefix, suffix = f".{path.name}.", ".part"
    _remove_leftovers(path.parent, prefix, suffix)
    part = path.with_name(f"{prefix}{_owner()}{suffix}")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def staged_folder(
    target: str | os.PathLike[str],
    replaces: Callable[[str], bool] | None = None,
    last: str | None = None,
    keep_existing: bool = False,
) -> Iterator[Path]:
    """Write a folder's content beside its place and move it there when the block has succeeded.

    A new folder appears in one step. Into an existing one the entries are moved one by one, see [`move_into_place`];
    if the block or a move fails, what stood there before is restored. Staging folders that killed processes left of
    earlier saves of the same target are removed.

    Args:
        target: The folder; made, with its parents, if needed.
        replaces: Says by its name whether an entry of an existing target belongs to an earlier save and is removed
            where the new one has no such entry. `None`: none is. All other entries stay.
        last: Name of the entry without which the folder counts as incomplete, such as `"config.json"`.
        keep_existing: Where another process has made the target in the meantime, leave it as it is.

    Yields:
        The staging folder, empty.

    Raises:
        NotADirectoryError: `target` is a file.
        OSError: A file cannot be written or moved.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{str(target)!r} is a file where a folder is needed.")
    beside = f".{target.name}{_STAGING_PREFIX}"
    _remove_leftovers(target, _STAGING_PREFIX)
    _remove_leftovers(target.parent, beside)
    # Inside an existing target, whose parent may be another file system or not writable.
    staging = target / f"{_STAGING_PREFIX}{_owner()}" if target.is_dir() else target.with_name(f"{beside}{_owner()}")
    staging.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir()
    try:
        yield staging
        move_into_place(staging, target, replaces, last, keep_existing)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_into_place(
    staging: Path,
    target: Path,
    replaces: Callable[[str], bool] | None = None,
    last: str | None = None,
    keep_existing: bool = False,
) -> None:
    """Move the entries of a staging folder to their target and remove the staging folder.

    The last step of [`staged_folder`], for processes that fill one staging folder together. In an existing target the
    entry `last` is removed first and moved last, so that a folder of which a killed process moved one half is not
    taken for a complete one.

    Args:
        staging: On the same file system as `target`, inside it or beside it.
        target: The folder; may be missing.
        replaces: As in [`staged_folder`].
        last: As in [`staged_folder`].
        keep_existing: As in [`staged_folder`].

    Raises:
        OSError: An entry cannot be moved; all are back where they were then.
    """
    if not target.exists():
        try:
            os.replace(staging, target)
            return
        except OSError:
            # Another process may have made it since.
            if not target.is_dir():
                raise
    if keep_existing:
        shutil.rmtree(staging, ignore_errors=True)
        return
    written = sorted(os.listdir(staging), key=lambda name: (name == last, name))
    others = sorted(set(os.listdir(target)) - {*written, staging.name})
    stale = [
        name for name in others if replaces is not None and replaces(name) and not name.startswith(_STAGING_PREFIX)
    ]
    replaced = staging / f"{_STAGING_PREFIX}replaced"
    replaced.mkdir()
    moved: list[str] = []
    try:
        for name in [*reversed(written), *stale]:
            if os.path.lexists(target / name):
                os.replace(target / name, replaced / name)
        for name in written:
            os.replace(staging / name, target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.replace(target / name, staging / name)
        for name in os.listdir(replaced):
            os.replace(replaced / name, target / name)
        replaced.rmdir()
        raise
    shutil.rmtree(staging, ignore_errors=True)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder at once: a process that is killed meanwhile leaves litter, but no half folder of this name.

    The next [`staged_folder`] in the folder around it removes the litter.

    Args:
        path: The folder.
    """
    path = Path(path)
    removed = path.with_name(f"{_STAGING_PREFIX}{_owner()}")
    os.replace(path, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _owner() -> str:
    """Name this process and one of its writes, as `_OWNER` parses it."""
    return f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"


def _remove_leftovers(folder: Path, prefix: str, suffix: str = "") -> None:
    """Remove the staging folders and files in `folder` whose process is not running any more."""
    try:
        names = os.listdir(folder)
    except OSError:
        # It does not exist yet, or its content may not be listed.
        return
    for name in names:
        if not (name.startswith(prefix) and name.endswith(suffix)):
            continue
        path = folder / name
        if _is_abandoned(path, name.removeprefix(prefix).removesuffix(suffix)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path, owner: str) -> bool:
    found = _OWNER.fullmatch(owner)
    # Process ids say something on the machine that gave them alone, and may be given again.
    if found is not None and found["host"] == platform.node() and not _is_running(int(found["pid"])):
        return True
    try:
        return time.time() - path.lstat().st_mtime > _ABANDONED_AFTER
    except OSError:
        # Its process has just removed it.
        return False


def _is_running(pid: int) -> bool:
    if os.name == "nt":
        # Signal 0 would end the process there, hence age alone decides.
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It belongs to another user.
        return True
    return True
