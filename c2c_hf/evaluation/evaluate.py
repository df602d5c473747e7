"""One call from a fuser to a table: load tasks, answer them by all methods, compute, report."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..checkpoints.receiver_adapter import has_adapter
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .answering import PlainAnswerer
from .methods import DERIVED, build_methods
from .metrics import compute_metrics
from .records import RunFolder
from .report import write_report
from .running import answer_tasks
from .tasks import load_tasks

#: What a sceptic asks for first.
DEFAULT_TASKS = ("arc_challenge", "openbookqa")
DEFAULT_METHODS = ("receiver", "sharer", "c2c", "mismatched", "alone")
_PACKAGES = ("c2c_hf", "torch", "transformers", "tokenizers", "datasets", "lm_eval", "scipy")


def evaluate(
    model: C2CForCausalLM,
    processor: C2CProcessor,
    output: str | Path,
    tasks: Sequence[str] = DEFAULT_TASKS,
    methods: Sequence[str] = DEFAULT_METHODS,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    chat: bool = True,
    max_new_tokens: int | None = None,
    adapter: str | None = None,
    self_fuser: tuple[C2CForCausalLM, C2CProcessor] | None = None,
    template_kwargs: dict[str, Any] | None = None,
    background_tokens: int = 256,
    fusion_fuser: tuple[C2CForCausalLM, C2CProcessor] | None = None,
) -> dict[str, Any]:
    """Evaluate a fuser against baselines and controls on the same items.

    Called again with the same folder it goes on where it was interrupted, and answers further tasks and methods.

    Args:
        model: The pair.
        processor: Its processor.
        output: Folder of the run: `predictions.jsonl`, `metrics.json`, `report.md`, plots and the configuration.
        tasks: Names of tasks, see `c2c evaluate --help`.
        methods: Names of methods, see `METHODS`.
        data_dir: Folder of JSON Lines; `None`: data from the Hub.
        limit: Items per task, drawn at random by `seed`; `None`: all.
        batch_size: Prompts read together.
        seed: Of the draw, of random controls and of the bootstrap.
        chat: Ask for written answers through each model's chat template, where it has one.
        max_new_tokens: Longest written answer; `None`: as the task says.
        adapter: Folder or Hub id of a LoRA adapter for the receiver, for the method `lora`.
        self_fuser: A pair whose sharer is its receiver, for the method `self`.
        template_kwargs: Handed to every chat template, such as `{"enable_thinking": False}`.
        background_tokens: Longest background of the method `text_to_text`.
        fusion_fuser: A pair with `mode="fusion"`, for the method `slice`.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: For unknown names, damaged data, a folder of another run, or a memory fuser and a task without
            contexts.
        FileNotFoundError: The data are not there.
    """
    if "routing" in methods:
        # It is worked out of the others' answers.
        methods = list(dict.fromkeys(["receiver", "sharer", *methods]))
    answered = [method for method in methods if method not in DERIVED]
    answering = build_methods(
        answered, model, processor, adapter, self_fuser, template_kwargs, background_tokens, fusion_fuser
    )
    loaded = load_tasks(tasks, None if data_dir is None else str(data_dir), limit, seed)
    bare = [task.name for task in loaded if not any(item.context for item in task.items)]
    if model.config.mode == "memory" and bare:
        raise ValueError(
            f"`tasks`: {bare} have no contexts, without which a memory fuser changes nothing; choose tasks that do, "
            "such as 'private_facts'."
        )
    if "routing" in methods and (written := [task.name for task in loaded if task.is_written]):
        raise ValueError(f"`methods`: 'routing' compares choices' likelihoods, but {written} ask for written answers.")
    settings = _settings(
        model,
        limit=limit,
        seed=seed,
        chat=chat,
        max_new_tokens=max_new_tokens,
        adapter=adapter,
        template_kwargs=template_kwargs,
        background_tokens=background_tokens,
    )
    folder = RunFolder(output, settings)
    answer_tasks(folder, loaded, answering, batch_size, seed, chat, max_new_tokens)
    sizes = {
        name: method.base_model.num_parameters()
        for name, method in answering.items()
        if name.startswith("sharer") and isinstance(method, PlainAnswerer)
    }
    # Those of earlier calls too.
    recorded = (record["method"] for record in folder.records)
    metrics = compute_metrics(
        folder.records,
        list(dict.fromkeys([*answering, *recorded, *(method for method in methods if method in DERIVED)])),
        max(sizes, key=lambda name: sizes[name], default="sharer"),
        seed,
    )
    metrics = {**metrics, "versions": versions(), "seed": seed, "config": settings, "batch_size": batch_size}
    folder.write_json("metrics.json", metrics)
    write_report(folder.path, metrics, folder.records)
    return metrics


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _settings(model: C2CForCausalLM, **choices: Any) -> dict[str, Any]:
    config = model.config
    return {
        "fuser": model.name_or_path or "untrained",
        "fuser_sha256": _digest(model),
        "receiver": config.receiver_name_or_path,
        "receiver_revision": config.receiver_revision,
        "receiver_fingerprint": config.receiver_fingerprint,
        "sharers": [sharer.name_or_path for sharer in config.sharers],
        "sharer_revisions": [sharer.revision for sharer in config.sharers],
        "sharer_fingerprints": [sharer.fingerprint for sharer in config.sharers],
        "token_alignment": config.token_alignments,
        "dtype": str(model.receiver.dtype).removeprefix("torch."),
        "device": str(model.device),
        **choices,
    }


def _digest(model: C2CForCausalLM) -> str:
    """Hash what was trained: a folder may be trained on, and its old answers must not count for the new fuser."""
    digest = hashlib.sha256()
    trained = dict(model.fuser.named_parameters())
    if has_adapter(model.receiver):
        base = {name for name, _ in model.receiver.named_parameters() if ".base_layer." in name}
        tuned = {name.rpartition(".base_layer.")[0] for name in base}
        own = model.receiver.named_parameters()
        trained |= {name: value for name, value in own if name not in base and name.startswith(tuple(tuned))}
    for name, parameter in sorted(trained.items()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
