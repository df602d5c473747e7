"""What a training run records for the model card: how the fuser was trained, and its results."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .._files import write_file

#: Stays in the run's folder; the card says what it holds.
RUN_FILE = "training_run.json"


@dataclass
class TrainingRun:
    """A run of [`C2CTrainer`].

    Attributes:
        training: Field -> value, as the card lists them.
        datasets: Hub ids of the training data.
        results: Rows as in an evaluation's `metrics.json`: `task`, `method`, `metric`, `value`, `num_items`.
    """

    training: dict[str, object] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: str | Path) -> None:
        """Write `training_run.json` into a folder."""
        write_file(Path(folder) / RUN_FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "TrainingRun | None":
        """Read it; `None` where no run wrote one.

        Raises:
            ValueError: It is damaged or has another structure.
        """
        path = Path(folder) / RUN_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            run = cls(**{each.name: content[each.name] for each in fields(cls)})
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{RUN_FILE} is damaged or has another structure ({error}); delete it.") from error
        expected = {"training": dict, "datasets": list, "results": list}
        for name, kind in expected.items():
            if not isinstance(getattr(run, name), kind):
                raise ValueError(f"{RUN_FILE} is damaged or has another structure (`{name}`); delete it.")
        return run
