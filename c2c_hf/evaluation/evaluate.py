"""One call from a fuser to a table: load tasks, answer them by all methods, compute results, write the report."""

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoints.receiver_adapter import has_adapter
from ..inference.fingerprints import fingerprint
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .methods.answerer import ModelAnswerer
from .methods.best_layers import choose_layers, single_layer_names
from .methods.registry import (
    BEST_LAYERS,
    DERIVED_METHODS,
    ModelWithProcessor,
    build_methods,
    check_names,
    number_of,
    split_name,
    uses_examples,
)
from .reading import BaselineFile, answer_reading, compute_reading
from .report import write_report
from .results import compute_results
from .run_records import Json, RunFolder, write_json
from .runner import answer_tasks
from .tasks.reading import MAX_LENGTH, READING, load_reading
from .tasks.task import EvaluationTask, load_tasks

DEFAULT_TASKS = ("arc_challenge", "openbookqa")
#: Both models without fusion, C2C, and the two controls that a gain must be measured against.
DEFAULT_METHODS = ("receiver", "sharer", "c2c", "mismatched", "fusion_off")
#: Where all tasks are questions about passages.
READING_METHODS = ("receiver", "receiver_with_context", "sharer", "c2c", "mismatched")
_PACKAGES = ("c2c_hf", "torch", "transformers", "tokenizers", "datasets", "evaluate", "lm_eval", "scipy")


def evaluate(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    output: str | Path,
    tasks: Sequence[str] = DEFAULT_TASKS,
    methods: Sequence[str] | None = None,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    chat: bool = True,
    max_new_tokens: int | None = None,
    adapter: str | None = None,
    self_fuser: ModelWithProcessor | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    background_tokens: int = 256,
    fusion_fuser: ModelWithProcessor | None = None,
    data: Sequence[str | Path] = (),
    max_length: int = MAX_LENGTH,
    baselines: str | Path | None = None,
    swapped_fuser: ModelWithProcessor | None = None,
    two_sharer_fuser: ModelWithProcessor | None = None,
) -> Json:
    """Evaluate a fuser against baselines and controls on the same items.

    Called again with the same folder it continues an interrupted run, and adds further tasks and methods. The
    processes that `accelerate launch` or `torchrun` starts share the items; they need a disk that all of them see.

    Args:
        model: The C2C model.
        processor: Its processor.
        output: Folder of the run: `predictions.jsonl`, `metrics.json`, `report.md`, plots and the configuration.
        tasks: Names of tasks, see `c2c evaluate --help`; `"reading"` for questions about the passages of `data`.
        methods: Names of methods, see `METHODS`. `None`: `READING_METHODS` where `"reading"` is the only task, else
            `DEFAULT_METHODS`.
        data_dir: Folder of JSON Lines; `None`: data from the Hub.
        limit: Items per task, drawn at random by `seed`; `None`: all.
        batch_size: Number of prompts per batch.
        seed: Of the draw, of random controls and of the bootstrap.
        chat: Whether generated answers are asked for through each model's chat template, where it has one.
        max_new_tokens: Maximum length of a generated answer; `None`: the task's.
        adapter: Folder or Hub id of a LoRA adapter for the receiver, for the method `receiver_with_adapter`.
        self_fuser: A fuser whose sharer is its receiver, for the method `receiver_as_sharer`.
        chat_template_kwargs: Arguments of every chat template, such as `{"enable_thinking": False}`.
        background_tokens: Maximum length of the background of the method `text_to_text`.
        fusion_fuser: A fuser with `mode="fusion"`, for the method `same_text_fusion`.
        data: JSON Lines files for `"reading"`, see [`~tasks.reading.load_reading`].
        max_length: Longest passage of `"reading"` in characters.
        baselines: JSON Lines file that keeps the answers of `FUSER_FREE_METHODS` to `"reading"` for evaluations of
            other fusers. `None`: `reading_baselines.jsonl` beside the folder of the run.
        swapped_fuser: A fuser whose receiver is the first sharer, for the method `swapped_pair`.
        two_sharer_fuser: A fuser with several sharers, for the method `two_sharers`.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: For unknown names, damaged data, a folder of another run, or a memory fuser and a task without
            contexts.
        FileNotFoundError: The data are missing.
    """
    if (READING in tasks) != bool(data):
        raise ValueError(f"`data` must name the files of the task 'reading', but got {list(data)} with {list(tasks)}.")
    if methods is None:
        methods = READING_METHODS if set(tasks) == {READING} else DEFAULT_METHODS
    if "routing" in methods:
        # It is computed from these methods' records.
        methods = list(dict.fromkeys(["receiver", "sharer", *methods]))
    check_names(methods)
    by_layers = [name for name in methods if split_name(name)[0] == BEST_LAYERS]
    layer_methods = single_layer_names(by_layers, len(model.config.receiver_layer_shapes or []))
    methods = list(dict.fromkeys([*methods, *layer_methods]))
    if READING in tasks and (unsuited := [name for name in methods if name in by_layers or uses_examples(name)]):
        raise ValueError(f"`methods`: {unsuited} need other items of a task, which 'reading' does not give.")
    built = build_methods(
        [method for method in methods if method not in (*DERIVED_METHODS, *by_layers)],
        model,
        processor,
        adapter,
        self_fuser,
        chat_template_kwargs,
        background_tokens,
        fusion_fuser,
        swapped_fuser,
        two_sharer_fuser,
    )
    named = [task for task in tasks if task != READING]
    loaded = load_tasks(named, None if data_dir is None else str(data_dir), limit, seed) if named else []
    reading = [load_reading(path, limit, seed, max_length) for path in data]
    if len({task.name for task in reading}) < len(reading):
        names = [task.name for task in reading]
        raise ValueError(f"`data`: folder and name must differ between the files, but got {names}.")
    without_context = [task.name for task in loaded if not any(item.context for item in task.items)]
    if model.config.mode == "memory" and without_context:
        raise ValueError(
            f"`tasks`: {without_context} have no contexts, without which a memory fuser changes nothing; choose tasks "
            "that do, such as 'private_facts'."
        )
    if "routing" in methods and (generated := [task.name for task in loaded if task.is_generation]):
        raise ValueError(f"`methods`: 'routing' compares choices' likelihoods, but {generated} generate answers.")
    settings = _settings(
        model,
        limit=limit,
        seed=seed,
        chat=chat,
        max_new_tokens=max_new_tokens,
        adapter=adapter,
        chat_template_kwargs=chat_template_kwargs,
        background_tokens=background_tokens,
        max_length=max_length,
    )
    # Who is done first waits for the others.
    folder = RunFolder(output, settings, PartialState(timeout=timedelta(days=7)))
    answer_tasks(folder, loaded, built, batch_size, seed, chat, max_new_tokens)
    for name in by_layers:
        for task in loaded:
            # Each half of the items is answered by the layers that do best on the other half.
            for half in _halves(task, seed):
                others = {item.id for item in task.items} - {item.id for item in half.items}
                layers = choose_layers(folder.records, task.name, others, number_of(name))
                of_layers = f"layers={','.join(map(str, layers))}"
                method = build_methods([of_layers], model, processor, chat_template_kwargs=chat_template_kwargs)
                chosen = {name: method[of_layers]}
                answer_tasks(folder, [half], chosen, batch_size, seed, chat, max_new_tokens)
    if reading:
        path = folder.path.absolute().parent / "reading_baselines.jsonl" if baselines is None else Path(baselines)
        stored = BaselineFile(path, folder, _baseline_settings(model, settings), built)
        answer_reading(folder, reading, built, stored, batch_size, chat, max_new_tokens)
    if not folder.processes.is_main_process:
        folder.processes.wait_for_everyone()
        return json.loads((folder.path / "metrics.json").read_text(encoding="utf-8"))
    sizes = {
        name: method.base_model.num_parameters()
        for name, method in built.items()
        if name.startswith("sharer") and isinstance(method, ModelAnswerer)
    }
    # Earlier calls may have recorded more methods.
    compared = [record for record in folder.records if "loglikelihood" not in record]
    recorded = (record["method"] for record in compared)
    results = compute_results(
        compared,
        list(dict.fromkeys([*built, *recorded, *(name for name in methods if name in DERIVED_METHODS)])),
        max(sizes, key=lambda name: sizes[name], default="sharer"),
        seed,
    )
    results["reading"] = compute_reading([record for record in folder.records if "loglikelihood" in record], seed)
    metrics = {**results, "versions": versions(), "seed": seed, "config": settings, "batch_size": batch_size}
    write_json(folder.path / "metrics.json", metrics)
    write_report(folder.path, metrics, compared)
    folder.processes.wait_for_everyone()
    return metrics


def _halves(task: EvaluationTask, seed: int) -> list[EvaluationTask]:
    """Split the items of a task at random into two tasks of equal size."""
    ordered = sorted(task.items, key=lambda item: item.seed(seed))
    halves = (ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :])
    return [replace(task, items=tuple(half)) for half in halves if half]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _settings(model: C2CForCausalLM, **options: object) -> Json:
    config = model.config
    return {
        "fuser": model.name_or_path or "untrained",
        "fuser_sha256": _fuser_hash(model),
        "receiver": config.receiver_name_or_path,
        "receiver_revision": config.receiver_revision,
        "receiver_fingerprint": config.receiver_fingerprint,
        "sharers": [sharer.name_or_path for sharer in config.sharers],
        "sharer_revisions": [sharer.revision for sharer in config.sharers],
        "sharer_fingerprints": [sharer.fingerprint for sharer in config.sharers],
        "token_alignment": config.token_alignments,
        "dtype": str(model.receiver.dtype).removeprefix("torch."),
        "device": str(model.device),
        **options,
    }


def _baseline_settings(model: C2CForCausalLM, settings: Json) -> Json:
    """Return what answers without a fuser depend on beside the item."""
    config = model.config
    return {
        "receiver": config.receiver_fingerprint or fingerprint(model.receiver),
        "sharers": [
            recorded.fingerprint or fingerprint(sharer)
            for recorded, sharer in zip(config.sharers, model.sharers, strict=True)
        ],
        **{
            name: settings[name]
            for name in ("dtype", "chat", "max_new_tokens", "chat_template_kwargs", "background_tokens")
        },
    }


def _fuser_hash(model: C2CForCausalLM) -> str:
    """Hash the trained weights: a folder may be trained further, and its old answers are not the new fuser's."""
    digest = hashlib.sha256()
    trained = dict(model.fuser.named_parameters())
    if has_adapter(model.receiver):
        # An adapted layer holds its original one as `base_layer`; everything else in it is the adapter's.
        original = {name for name, _ in model.receiver.named_parameters() if ".base_layer." in name}
        adapted = tuple({name.rpartition(".base_layer.")[0] for name in original})
        parameters = model.receiver.named_parameters()
        trained |= {name: value for name, value in parameters if name not in original and name.startswith(adapted)}
    for name, parameter in sorted(trained.items()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
