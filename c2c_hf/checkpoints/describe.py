"""Describe a saved fuser without loading its base models, as `c2c inspect` does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers.utils import PROCESSOR_NAME

from ..configuration_c2c import C2CConfig, SharerConfig
from ..fusers import build_fusers, fuser_state_dict
from ..fusers.c2c import C2CFuser
from ..fusers.memory import MemoryFuser
from .base_models import summarize_shapes
from .download import check_subfolder, find_file, shipped_folder
from .fuser_weights import check_fuser_weights, load_fuser_weights


def describe_fuser(name_or_path: str | Path, **hub_kwargs: Any) -> list[tuple[str, str]]:
    """Describe a fuser: its pair, its sizes, its open gates, and whether processor, card and code are there.

    Args:
        name_or_path: Hub id or folder, or `"general"` or `"memory"`, which come with the package.
        **hub_kwargs: Arguments of the Hub: `revision`, `subfolder`, `token`, ...

    Returns:
        Labels and texts, in the order of a report.

    Raises:
        ValueError: It is no fuser, or its weights do not fit its configuration.
        OSError: A file is missing, or the Hub does not answer.
    """
    name = str(shipped_folder(str(name_or_path)) or name_or_path)
    check_subfolder(hub_kwargs.get("subfolder"))
    config = C2CConfig.from_pretrained(name, **hub_kwargs)
    shapes = [config.receiver_layer_shapes, *(sharer.layer_shapes for sharer in config.sharers)]
    if not config.sharers or None in shapes:
        raise ValueError(f"{name!r} is no saved fuser, since its configuration names no pair.")
    weights = load_fuser_weights(name, hub_kwargs)
    fusers = _load_fusers(config, weights)

    receiver = (config.receiver_name_or_path, config.receiver_revision, config.receiver_config)
    lines = [("receiver", _describe_model(*receiver, config.receiver_layer_shapes))]
    for index, sharer in enumerate(config.sharers):
        model = (sharer.name_or_path, sharer.revision, sharer.config)
        lines.append((f"sharer {index}", _describe_model(*model, sharer.layer_shapes)))
    lines.append(("token alignment", ", ".join(config.token_alignments)))
    lines.append(("mode", _describe_mode(config)))
    for index, (fuser, sharer) in enumerate(zip(fusers, config.sharers, strict=True)):
        own = {name: value for name, value in weights.items() if name.startswith(f"fuser.{index}.")}
        size = f"{count_parameters(own):,} weights, {readable_size(sum(value.nbytes for value in own.values()))}"
        if isinstance(fuser, MemoryFuser):
            lines.append((f"fuser {index}", f"{size}; {_describe_maps(config, fuser)}"))
        else:
            lines.append((f"fuser {index}", f"{size}; {_describe_sizes(config, sharer)}"))
            lines.append((f"gates {index}", f"{gate_summary(own)}; {_open_layers(fuser)}"))
    lines.append(("token tables", str(sum(name.startswith("token_table_") for name in weights))))
    lines.append(("processor", "yes" if find_file(name, PROCESSOR_NAME, hub_kwargs) else "no"))
    lines.append(("code", ", ".join(sorted(getattr(config, "auto_map", None) or {})) or "none"))
    lines.append(("card", _describe_card(name, hub_kwargs)))
    return lines


def count_parameters(weights: Mapping[str, torch.Tensor]) -> int:
    """Count the trained numbers among saved weights of a fuser.

    Scalars such as the gate temperature belong to the trainer's state, means and scales are measured.
    """
    return sum(
        value.numel()
        for name, value in weights.items()
        if name.startswith("fuser.") and value.dim() > 0 and not name.endswith(("_mean", "_scale"))
    )


def gate_summary(weights: Mapping[str, torch.Tensor]) -> str:
    """Say how many gates are open at inference."""
    logits = [value.flatten() for name, value in weights.items() if "gate_logit" in name]
    if not logits:
        return "no gates"
    gates = torch.cat(logits) > 0
    count = f"{int(gates.sum())} of {len(gates)} gates are open"
    return count if gates.any() else f"{count}, so the answers are the receiver's own"


def readable_size(num_bytes: int) -> str:
    """Return a size in kB, MB or GB."""
    size, unit = num_bytes / 1e3, "kB"
    for larger in ("MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.1f} {unit}"


def _load_fusers(config: C2CConfig, weights: Mapping[str, torch.Tensor]) -> list[C2CFuser | MemoryFuser]:
    # On the meta device nothing is allocated, whatever sizes the configuration names.
    with torch.device("meta"):
        fusers = build_fusers(config)
    found = {name: value for name, value in weights.items() if name.startswith("fuser.")}
    modules = torch.nn.ModuleList(fusers).eval()
    check_fuser_weights(found, fuser_state_dict(modules))
    # Weights that fusers share are there once.
    modules.load_state_dict(
        {name.removeprefix("fuser."): value for name, value in found.items()}, strict=False, assign=True
    )
    return fusers


def _describe_model(
    name: str | None, revision: str | None, config: object, layer_shapes: Sequence[Sequence[int]] | None
) -> str:
    where = f"{name or 'given as a model without a name'}{f' at {revision}' if revision else ''}"
    shapes = f"layers {summarize_shapes(layer_shapes or [])} (heads, key width, value width)"
    return f"{where}; {getattr(config, 'model_type', 'unknown')}, {shapes}"


def _describe_mode(config: C2CConfig) -> str:
    if config.mode == "memory":
        return f"memory, slots on the {config.memory_grid}'s grid, sink tokens {config.memory_sink_tokens}"
    answers = "fused" if config.fuse_response else "not fused"
    return f"fusion, {config.fusion_mode}, layer alignment {config.layer_alignment}, answers {answers}"


def _describe_sizes(config: C2CConfig, sharer: SharerConfig) -> str:
    sizes = f"hidden {sharer.fuser_hidden_size}, intermediate {sharer.fuser_intermediate_size}"
    parts = [] if config.fuser_type == "c2c" else [config.fuser_type]
    parts += [f"{sizes}, {sharer.num_fuser_layers} layers"]
    if config.layer_alignment == "learned":
        parts.append(f"{config.fusion_source_layers} sharer layers per receiver layer")
    parts += ["keys and values together"] if config.joint_keys_values else []
    parts += ["keys free of rotary position"] if config.unrotate_keys else []
    return ", ".join(parts)


def _describe_maps(config: C2CConfig, fuser: MemoryFuser) -> str:
    rank = "full rank" if config.memory_rank is None else f"rank {config.memory_rank}"
    hidden = f", hidden {config.memory_hidden_size}" if config.memory_hidden_size else ""
    count = fuser.num_token_embeddings
    embeddings = f", {count} token embeddings per slot" if count else ""
    return f"{len(fuser.source_layers[0])} sharer layers per receiver layer{embeddings}, {rank}{hidden}"


def _open_layers(fuser: C2CFuser) -> str:
    opened: dict[str, list[int]] = {"keys": [], "values": []}
    for group in fuser.groups:
        for index in group.active_entries():
            entry = group.entries[index]
            opened["keys" if entry < fuser.num_layers else "values"].append(entry % fuser.num_layers)
    return "; ".join(f"{kind} of layers {_ranges(sorted(layers))}" for kind, layers in opened.items())


def _ranges(numbers: Sequence[int]) -> str:
    """Write 0, 1, 2, 5 as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def _describe_card(name: str, hub_kwargs: dict[str, Any]) -> str:
    path = find_file(name, "README.md", hub_kwargs)
    if path is None:
        return "none"
    data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    results = sum(len(entry.get("results", [])) for entry in data.get("model-index", []))
    return f"license {data.get('license', 'not named')}, {results} results"
