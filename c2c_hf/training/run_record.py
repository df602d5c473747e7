"""What a run is recorded by: its fields and results, for the model card."""

import dataclasses
from collections.abc import Mapping, Sequence, Sized
from importlib.metadata import version
from typing import Any, NamedTuple

from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from ..hub.model_card import OWN_METHOD
from ..hub.training_run import TrainingRun
from .arguments import C2CTrainingArguments

#: Fields of every run, in this order; those of `C2CTrainingArguments` follow where they differ from the defaults.
_FIELDS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_length", "seed")
#: What stands in a card for data without a name.
_UNNAMED = "evaluation_data"


class Evaluated(NamedTuple):
    """An evaluation.

    Attributes:
        step: After how many steps.
        num_items: Number of examples.
        metrics: Name, which starts with the prefix -> value.
    """

    step: int
    num_items: int
    metrics: dict[str, float]


def record_run(
    args: C2CTrainingArguments,
    state: TrainerState,
    train_dataset: object,
    evaluated: Mapping[str, Evaluated],
    dataset_names: Sequence[str],
) -> TrainingRun:
    """Record a run as it is now.

    Args:
        args: Of the run.
        state: Its steps and logs.
        train_dataset: Its training data.
        evaluated: Prefix of the metrics' names, such as `"eval"` -> the last evaluation.
        dataset_names: Hub ids of the training data.
    """
    training: dict[str, object] = {"steps": state.global_step, "epochs": round(float(state.epoch or 0.0), 2)}
    if isinstance(train_dataset, Sized):
        training["examples"] = len(train_dataset)
    training["rows_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    training |= {name: _plain(getattr(args, name)) for name in _FIELDS}
    shared = {field.name for field in dataclasses.fields(TrainingArguments)} | set(_FIELDS)
    for field in dataclasses.fields(C2CTrainingArguments):
        value, factory = getattr(args, field.name), field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        if field.name not in shared and value not in (default, {}):
            training[field.name] = _plain(value)
    training["autocast"] = "bfloat16" if args.bf16 else "float16" if args.fp16 else "off"
    logged = _latest(state, ("loss", "gates_open_key", "gates_open_value"))
    training |= {f"final_{name}": f"{value:.4g}" for name, value in logged.items()}
    training["versions"] = ", ".join(f"{name} {version(name)}" for name in ("c2c_hf", "transformers", "torch"))
    return TrainingRun(training, list(dataset_names), _results(state, evaluated))


def _plain(value: Any) -> object:
    """Return a field as JSON has it; enumerations by their value."""
    value = getattr(value, "value", value)
    return value if isinstance(value, str | int | float | bool) else str(value)


def _latest(state: TrainerState, names: Sequence[str]) -> dict[str, float]:
    """Return the last logged value of each name."""
    found: dict[str, float] = {}
    for entry in state.log_history:
        found |= {name: entry[name] for name in names if name in entry}
    return found


def _results(state: TrainerState, evaluated: Mapping[str, Evaluated]) -> list[dict[str, Any]]:
    """Return the metrics of evaluations of the fuser as it is now, as rows of a card."""
    rows = []
    for prefix, (step, num_items, metrics) in evaluated.items():
        task = prefix.removeprefix("eval").strip("_") or _UNNAMED
        shared = {"task": task, "method": OWN_METHOD, "interval": None, "num_items": num_items}
        for name, value in metrics.items() if step == state.global_step else ():
            if not name.endswith("_time"):
                rows.append({**shared, "metric": name.removeprefix(f"{prefix}_"), "value": float(value)})
    return rows
