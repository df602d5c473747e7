"""`RunFolder`: the evidence of a run in one folder, one line per answered item, complete after any interruption."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from .._files import write_file

logger = logging.getLogger(__name__)

#: A JSON object.
Json: TypeAlias = dict[str, Any]
#: One answered item: `task`, `method`, `id`, `answer`, `prediction`, `correct`, `seconds`, and for compared
#: choices `scores` and `confidence`, for generated answers `text` and numbers of tokens.
Record: TypeAlias = Json

#: What every line has.
_COLUMNS = ("task", "method", "id", "correct")


class RunFolder:
    """Predictions, configuration and results of a run.

    Args:
        path: The folder; made if needed.
        settings: All that decides the predictions. A folder of other settings is not continued.

    Raises:
        ValueError: The folder holds a run with other settings, or predictions that are damaged.
    """

    def __init__(self, path: str | Path, settings: Json) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise ValueError(f"`output` must be a folder, but {str(path)!r} is a file.")
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.path / "config.json"
        if config.exists():
            saved = json.loads(config.read_text(encoding="utf-8"))
            changed = sorted(key for key in {*saved, *settings} if saved.get(key) != settings.get(key))
            if changed:
                key = changed[0]
                raise ValueError(
                    f"`output`: the run in {str(path)!r} was started with {key}={saved.get(key)!r}, not "
                    f"{settings.get(key)!r}; choose another folder or the same settings."
                )
        else:
            write_json(config, settings)
        self.records = self._load_records()

    @property
    def predictions(self) -> Path:
        """The file of answered items."""
        return self.path / "predictions.jsonl"

    def append(self, records: Iterable[Record]) -> None:
        """Add answered items; they are on the disk when this returns."""
        new = list(records)
        append_lines(self.predictions, new)
        self.records += new

    def _load_records(self) -> list[Record]:
        return [self._parse(line, number) for number, line in enumerate(read_lines(self.predictions), start=1)]

    def _parse(self, line: bytes, number: int) -> Record:
        place = f"{self.predictions}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: delete that line, and its item is answered again.") from error
        missing = [name for name in _COLUMNS if name not in record]
        if missing:
            raise ValueError(f"{place} lacks {missing}: delete that line, and its item is answered again.")
        return record


def read_lines(path: Path) -> list[bytes]:
    """Read the lines of a file that [`append_lines`] writes; one that an interruption left incomplete is removed."""
    if not path.exists():
        return []
    whole, newline, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        logger.info("%s ends within a line: that item is answered again.", path)
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
    return whole.splitlines()


def append_lines(path: Path, rows: Iterable[Json]) -> None:
    """Add rows to a JSON Lines file; they are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def group_records(records: Iterable[Record]) -> dict[str, dict[str, dict[str, Record]]]:
    """Group records by task, method and item id."""
    grouped: dict[str, dict[str, dict[str, Record]]] = {}
    for record in records:
        grouped.setdefault(record["task"], {}).setdefault(record["method"], {})[record["id"]] = record
    return grouped


def write_json(path: Path, content: object) -> None:
    """Write a file as JSON, completely or not at all."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
