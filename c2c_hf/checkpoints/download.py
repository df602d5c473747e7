"""Files of saved fusers: in a folder, in this package, or downloaded from the Hub and compared with their sha256."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

#: Keyword arguments of `from_pretrained` that say where on the Hub a file is.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
#: Names of the trained fusers that come with this package.
SHIPPED_FUSERS = ("general", "memory")


def shipped_folder(name: str) -> Path | None:
    """Return the folder of a fuser that comes with this package.

    Args:
        name: One of `SHIPPED_FUSERS`. For any other name, and where there is a folder of this name, `None` is
            returned.
    """
    if name not in SHIPPED_FUSERS or Path(name).exists():
        return None
    return Path(__file__).parents[1] / "pretrained" / name


def check_subfolder(subfolder: str | None) -> None:
    """Refuse a subfolder outside the repository or folder.

    Raises:
        ValueError: It is absolute or goes up.
    """
    if subfolder and (re.match(r"[/\\\\]|.*:", subfolder) or ".." in re.split(r"[/\\\\]", subfolder)):
        raise ValueError(f"`subfolder` must be a folder inside the repository, but got {subfolder!r}.")


def find_file(name: str, filename: str, hub_kwargs: dict[str, Any]) -> str | None:
    """Find a file in a folder or on the Hub, from where it is downloaded if needed.

    Args:
        name: Folder or Hub id.
        filename: Name of the file, or its path in the folder.
        hub_kwargs: Arguments of the Hub, see `HUB_KWARGS`.

    Returns:
        Its path, or `None` if there is no such file.

    Raises:
        OSError: The Hub refuses or does not answer.
    """
    if Path(name).is_dir():
        path = Path(name, hub_kwargs.get("subfolder") or "", filename)
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(name, filename, **hub_kwargs)
    except LocalEntryNotFoundError as error:
        # Offline, a file that is not in the cache counts as missing.
        if hub_kwargs.get("local_files_only") or is_offline_mode():
            return None
        raise OSError(
            f"The Hub does not answer, and {filename} of {name!r} is not in the cache; try again."
        ) from error
    except EntryNotFoundError:
        return None
    except HTTPError as error:
        raise OSError(f"{filename} of {name!r} could not be downloaded ({error}); try again.") from error


def fetch_folder(name: str | os.PathLike, patterns: Sequence[str], hub_kwargs: dict[str, Any]) -> Path:
    """Return a folder, or download one with the matching files of a repository, all of one commit.

    Args:
        name: Folder or Hub id.
        patterns: Of the files, such as `"tokenizer*"`.
        hub_kwargs: Arguments of the Hub, see `HUB_KWARGS`; with `subfolder`, its path is returned.

    Raises:
        OSError: The Hub refuses or does not answer.
        ValueError: `subfolder` goes outside the folder.
    """
    kwargs = {key: value for key, value in hub_kwargs.items() if value is not None}
    subfolder = kwargs.pop("subfolder", "")
    check_subfolder(subfolder)
    if Path(name).is_dir():
        return Path(name, subfolder)
    kwargs.pop("proxies", None)
    wanted = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted, **kwargs), subfolder)
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise OSError(f"{str(name)!r} is not a folder and could not be downloaded: {error}") from error


def check_download(path: Path) -> None:
    """Compare the sha256 of a download with the one that the Hub announced; huggingface_hub compares sizes only.

    Args:
        path: A file. One that is not in the cache of the Hub, or not stored there by its sha256, is not compared.

    Raises:
        ValueError: They differ. The file is removed from the cache, so that a retry downloads it again.
    """
    blob = path.resolve()
    if not path.is_symlink() or blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink()
        raise ValueError(
            f"{path.name} was damaged during the download: its sha256 is {found}, but the Hub announces {blob.name}; "
            "try again."
        )
