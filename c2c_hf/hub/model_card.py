"""The model card of a fuser: what it is, how it was trained, what was measured and what was not."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoints.describe import count_parameters, gate_summary, readable_size
from ..configuration_c2c import C2CConfig
from .licenses import BaseLicense, fuser_license, license_text
from .training_run import TrainingRun

TEMPLATE = Path(__file__).with_name("model_card_template.md")
METRICS_FILE = "metrics.json"
#: The name of the fuser's own results among the methods of an evaluation.
OWN_METHOD = "c2c"
_RESULT_TEXTS = ("task", "method", "metric")


def render_model_card(
    config: C2CConfig,
    weights: Mapping[str, torch.Tensor],
    bases: Sequence[BaseLicense],
    repo_id: str,
    subfolder: str | None = None,
    license: str | None = None,
    evaluation: str | Path | None = None,
    training: Mapping[str, object] | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    run: TrainingRun | None = None,
) -> ModelCard:
    """Render the card of one fuser.

    Args:
        config: Of the fuser.
        weights: The saved weights, see [`~checkpoints.fuser_weights.load_fuser_weights`].
        bases: Hub ids and licenses of receiver and sharers, see [`~hub.licenses.base_licenses`].
        repo_id: The repository where the fuser is published.
        subfolder: Its folder there.
        license: The Hub's name of a license. `None`: the one that follows from the base models' licenses.
        evaluation: A folder of `c2c evaluate`, whose `metrics.json` is read. `None`: the card says that nothing was
            evaluated.
        training: How the fuser was trained, field by field. `None`: as `run` says; without one, the card says that
            this is not recorded.
        datasets: Hub ids of the training data. Empty: those of `run`.
        tags: Further tags.
        run: What the trainer recorded; its results stand beside those of `evaluation`.

    Raises:
        ValueError: The license cannot be determined, or `metrics.json` has an unknown structure.
        OSError: A file is missing.
    """
    metrics = read_metrics(evaluation) if evaluation is not None else {}
    results = metrics.get("results", [])
    if run is not None:
        tags = ["generated_from_trainer", *tags]
        training, datasets = training or run.training, datasets or run.datasets
        results = [*results, *(_checked(row, _RESULT_TEXTS) for row in run.results)]
    resolved = fuser_license(bases, license)
    repo_name = repo_id.split("/")[-1]
    card_data = ModelCardData(
        base_model=list(dict.fromkeys(base.name for base in bases)),
        base_model_relation="adapter",
        library_name="c2c_hf",
        pipeline_tag="text-generation",
        license=resolved,
        datasets=list(datasets) or None,
        tags=list(dict.fromkeys(["cache-to-cache", "c2c", *tags])),
        model_name=repo_name,
        eval_results=_eval_results(results) or None,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=repo_name if subfolder is None else f"{repo_name}/{subfolder}",
        repo_id=repo_id,
        subfolder_argument="" if subfolder is None else f', subfolder="{subfolder}"',
        **_description(config, bases, weights),
        with_code=bool(getattr(config, "auto_map", None)),
        training=[(_cell(field), _cell(value)) for field, value in (training or {}).items()],
        results=[_row(row) for row in results],
        has_controls=any(row["method"] != OWN_METHOD for row in results),
        pairing_gain=[_row(row) for row in metrics.get("pairing_gain", [])],
        license_text=license_text(resolved, bases),
    )


def _description(
    config: C2CConfig, bases: Sequence[BaseLicense], weights: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    configs = [config.receiver_config, *(sharer.config for sharer in config.sharers)]
    shapes = [config.receiver_layer_shapes, *(sharer.layer_shapes for sharer in config.sharers)]
    revisions = [config.receiver_revision, *(sharer.revision for sharer in config.sharers)]
    models = [
        {
            "role": "sharer" if index else "receiver",
            "name": base.name,
            "architecture": getattr(configs[index], "model_type", "unknown"),
            "layers": len(shapes[index] or []),
            "revision": f"`{revisions[index]}`" if revisions[index] else "not recorded",
        }
        for index, base in enumerate(bases)
    ]
    return {
        "receiver": models[0],
        "sharers": models[1:],
        "num_parameters": f"{count_parameters(weights):,}",
        "size": readable_size(sum(value.nbytes for value in weights.values())),
        "token_alignment": ", ".join(f"`{alignment}`" for alignment in config.token_alignments),
        "layer_alignment": config.layer_alignment,
        "fusion_mode": config.fusion_mode,
        "mode": config.mode,
        "gates": gate_summary(weights),
    }


def read_metrics(evaluation: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Read `results` and `pairing_gain` of an evaluation folder.

    Args:
        evaluation: The folder.

    Returns:
        Two lists of rows with `task`, `value`, `interval` (`None` where there is none) and `num_items`; those of
        `results` have `method` and `metric` as well.

    Raises:
        OSError: There is no `metrics.json`.
        ValueError: It is damaged, or has another structure.
    """
    path = Path(evaluation) / METRICS_FILE
    if not path.is_file():
        raise OSError(f"`evaluation`: {str(evaluation)!r} holds no {METRICS_FILE}; give a folder of `c2c evaluate`.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            "results": [_checked(row, _RESULT_TEXTS) for row in content.get("results", [])],
            "pairing_gain": [_checked(row, ("task",)) for row in content.get("pairing_gain", [])],
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"`evaluation`: {path.name} is damaged or has another structure ({error}).") from error


def _checked(row: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name in texts:
        if not isinstance(row[name], str):
            raise TypeError(f"{name} is not a string: {row[name]!r}")
        checked[name] = row[name]
    interval = row.get("interval")
    checked["value"] = float(row["value"])
    checked["interval"] = None if interval is None else [float(interval[0]), float(interval[1])]
    checked["num_items"] = int(row["num_items"])
    return checked


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    interval = row["interval"]
    cells = {name: _cell(value) for name, value in row.items() if name not in ("value", "interval")}
    cells["value"] = f"{row['value']:.4f}"
    cells["interval"] = "not computed" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
    return cells


def _cell(value: object) -> str:
    """Escape a value for a cell of a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def _eval_results(results: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=row["task"],
            metric_type=row["metric"],
            metric_value=row["value"],
        )
        for row in results
        if row["method"] == OWN_METHOD
    ]
