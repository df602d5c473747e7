"""Reads rows from JSON Lines files or the Hub, and names the row that cannot be read."""

import gzip
import json
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

_JSON_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def load_rows(
    name: str, split: str = "train", config: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """Load one data set.

    Args:
        name: A JSON Lines file, plain or gzip, or a Hub id.
        split: Split of a Hub data set; a file is taken whole.
        config: Configuration name of a Hub data set.
        streaming: Read on the fly.

    Raises:
        ValueError: The file does not exist or is no JSON Lines in UTF-8, naming the row.
    """
    if not name.endswith(_JSON_ENDINGS):
        return load_dataset(name, config, split=split, streaming=streaming)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"The data file {name!r} does not exist.")
    _check_lines(path, parse=False)
    try:
        return load_dataset("json", data_files=str(path), split="train", streaming=streaming)
    except (DatasetGenerationError, ValueError) as error:
        _check_lines(path, parse=True)
        cause = error.__cause__ or error
        raise ValueError(f"{name!r} could not be read as JSON Lines, one object a row: {cause}") from error


def _check_lines(path: Path, parse: bool) -> None:
    """Name the first row that is not UTF-8, or, where asked for, no JSON object."""
    lines = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    number = 0
    with lines:
        try:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if parse and text.strip() and not isinstance(json.loads(text), dict):
                    raise ValueError("it is no object")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"Row {number} of {path} is not UTF-8 (byte 0x{byte:02x}): convert the file.") from None
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged behind row {number}: {error}") from None
        except ValueError as error:
            raise ValueError(f"Row {number} of {path} is no JSON object: {error}.") from None
