"""`RunFolder`: the evidence of a run in one folder, one line per answered item, complete after any interruption.

Several processes, as `accelerate launch` starts them, write a file each; they are put together at the end of the run,
or at the start of the next one.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from accelerate import PartialState

from .._files import write_file

logger = logging.getLogger(__name__)

#: A JSON object.
Json: TypeAlias = dict[str, Any]
#: One answered item: `task`, `method`, `id`, `answer`, `prediction`, `correct`, `seconds`, and for compared
#: choices `scores` and `confidence`, for generated answers `text` and numbers of tokens.
Record: TypeAlias = Json

Batch = TypeVar("Batch")

#: What every line has.
_COLUMNS = ("task", "method", "id", "correct")


class SharedLines:
    """A JSON Lines file that the processes of a run extend together.

    Args:
        path: The file.
        parts: The folder of each process's own lines, on a disk that all share.
        processes: Of the run.
    """

    def __init__(self, path: Path, parts: Path, processes: PartialState) -> None:
        self.path, self._parts, self._processes = path, parts, processes
        alone = processes.num_processes == 1
        self._own = path if alone else parts / f"{path.stem}.{processes.process_index}.jsonl"

    def append(self, rows: Iterable[Json]) -> None:
        """Add rows; they are on the disk when this returns, and in the file after [`join`]."""
        append_lines(self._own, rows)

    def join(self) -> list[bytes]:
        """Wait for all processes, put their lines together, also those of an interrupted run, and return them all."""
        self._processes.wait_for_everyone()
        if self._processes.is_main_process:
            whole = set(read_lines(self.path))
            for part in sorted(self._parts.glob(f"{self.path.stem}.*.jsonl")):
                # An interruption after the first of these two steps leaves lines in both files.
                append_lines(self.path, (json.loads(line) for line in read_lines(part) if line not in whole))
                part.unlink()
        self._processes.wait_for_everyone()
        return read_lines(self.path)


class RunFolder:
    """Predictions, configuration and results of a run.

    Args:
        path: The folder; made if needed.
        settings: All that decides the predictions. A folder of other settings is not continued.
        processes: Those that share the run, each with an object of this class. `None`: this one.

    Attributes:
        records: All answered items; of those that the processes add now, this process's own before [`join`].

    Raises:
        ValueError: The folder holds a run with other settings, or predictions that are damaged.
    """

    def __init__(self, path: str | Path, settings: Json, processes: PartialState | None = None) -> None:
        self.path, self.processes = Path(path), processes or PartialState()
        if self.path.is_file():
            raise ValueError(f"`output` must be a folder, but {str(path)!r} is a file.")
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.path / "config.json"
        if self.processes.is_main_process and not config.exists():
            write_json(config, settings)
        self.processes.wait_for_everyone()
        saved = json.loads(config.read_text(encoding="utf-8"))
        for key in sorted({*saved, *settings}):
            if saved.get(key) != settings.get(key):
                raise ValueError(
                    f"`output`: the run in {str(path)!r} was started with {key}={saved.get(key)!r}, not "
                    f"{settings.get(key)!r}; choose another folder or the same settings."
                )
        self._lines = SharedLines(self.predictions, self.path, self.processes)
        self.records: list[Record] = []
        self.join()

    @property
    def predictions(self) -> Path:
        """The file of answered items."""
        return self.path / "predictions.jsonl"

    def append(self, records: Iterable[Record]) -> None:
        """Add answered items; they are on the disk when this returns."""
        new = list(records)
        self._lines.append(new)
        self.records += new

    def join(self) -> None:
        """Wait until every process is here, and load the items that all have answered."""
        self.records = [self._parse(line, number) for number, line in enumerate(self._lines.join(), start=1)]

    def own_share(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return the batches that this process answers."""
        return batches[self.processes.process_index :: self.processes.num_processes]

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
