"""Describes a saved fuser without loading its base models."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from ..configuration_c2c import C2CConfig
from ..fusers.c2c import C2CFuser
from ..hub.model_card import open_gates, readable_size
from .base_models import summarize_shapes
from .download import check_subfolder, find_file
from .fuser_weights import check_fuser_weights, load_fuser_weights


def describe_fuser(name_or_path: str | Path, **hub_kwargs: Any) -> list[tuple[str, str]]:
    """Describe a fuser: its pair, its sizes, which gates are open, whether processor, card and code are there.

    Args:
        name_or_path: Hub id or folder.
        **hub_kwargs: Where on the Hub: `revision`, `subfolder`, `token`, ...

    Returns:
        Labels and texts, in the order of a report.

    Raises:
        ValueError: It is no fuser, or its weights do not fit its configuration.
        OSError: A file is missing, or the Hub does not answer.
    """
    check_subfolder(hub_kwargs.get("subfolder"))
    config = C2CConfig.from_pretrained(name_or_path, **hub_kwargs)
    if (
        not config.num_sharers
        or config.receiver_layer_shapes is None
        or any(sharer.layer_shapes is None for sharer in config.sharers)
    ):
        raise ValueError(f"{str(name_or_path)!r} is no saved fuser, since its configuration names no pair.")
    weights = load_fuser_weights(name_or_path, hub_kwargs)
    # On the meta device nothing is allocated, whatever sizes the configuration names.
    with torch.device("meta"):
        fusers = [C2CFuser(config, sharer) for sharer in config.sharers]
    own = {name: value for name, value in weights.items() if name.startswith("fuser.")}
    states = (fuser.state_dict(prefix=f"fuser.{index}.") for index, fuser in enumerate(fusers))
    check_fuser_weights(own, {name: value for state in states for name, value in state.items()})

    lines = [
        ("receiver", _base(config, None)),
        *((f"sharer {i}", _base(config, i)) for i in range(config.num_sharers)),
    ]
    lines.append(("token alignment", ", ".join(config.token_alignments)))
    modes = f"layers {config.layer_alignment}, fusion {config.fusion_mode}, context {config.mode}"
    lines.append(("modes", f"{modes}, answers {'fused' if config.fuse_response else 'not fused'}"))
    for index, fuser in enumerate(fusers):
        own = {name: value for name, value in weights.items() if name.startswith(f"fuser.{index}.")}
        sizes = config.sharers[index]
        count = sum(value.numel() for value in own.values() if value.dim() > 0)
        size = readable_size(sum(value.nbytes for value in own.values()))
        shape = f"hidden {sizes.hidden_size}, intermediate {sizes.intermediate_size}, {sizes.num_layers} layers"
        lines.append((f"fuser {index}", f"{count:,} weights, {size}; {shape}"))
        lines.append((f"gates {index}", f"{open_gates(own)}; {_open_layers(fuser, own, index)}"))
    tables = sum(name.startswith("token_table_") for name in weights)
    lines.append(("token tables", str(tables)))
    lines.append(("processor", "yes" if find_file(str(name_or_path), "processor_config.json", hub_kwargs) else "no"))
    lines.append(("code", ", ".join(sorted(getattr(config, "auto_map", None) or {})) or "none"))
    lines.append(("card", _card(str(name_or_path), hub_kwargs)))
    return lines


def _base(config: C2CConfig, index: int | None) -> str:
    values: list[Any] = [
        config.receiver_name_or_path,
        config.receiver_revision,
        config.receiver_config,
        config.receiver_layer_shapes,
    ]
    if index is not None:
        sharer = config.sharers[index]
        values = [sharer.name_or_path, sharer.revision, sharer.config, sharer.layer_shapes]
    name, revision, base, shapes = values
    where = f"{name or 'handed over, without a name'}{f' at {revision}' if revision else ''}"
    return f"{where}; {base.model_type}, layers {summarize_shapes(shapes)} (heads, key width, value width)"


def _open_layers(fuser: C2CFuser, weights: dict[str, torch.Tensor], index: int) -> str:
    opened: dict[str, list[int]] = {"keys": [], "values": []}
    for group_index, group in enumerate(fuser.groups):
        logits = weights[f"fuser.{index}.groups.{group_index}.gate.gate_logit"]
        for entry, logit in zip(group.entries, logits.tolist(), strict=True):
            if logit > 0:
                opened["keys" if entry < fuser.num_layers else "values"].append(entry % fuser.num_layers)
    return "; ".join(f"{kind} of layers {_ranges(sorted(layers))}" for kind, layers in opened.items())


def _ranges(numbers: list[int]) -> str:
    """Write `0-2, 5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def _card(name: str, hub_kwargs: dict[str, Any]) -> str:
    path = find_file(name, "README.md", hub_kwargs)
    if path is None:
        return "none"
    data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    results = sum(len(entry.get("results", [])) for entry in data.get("model-index", []))
    return f"license {data.get('license', 'not named')}, {results} results"
