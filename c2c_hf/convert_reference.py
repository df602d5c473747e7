"""Convert fusers from the layout that the reference implementation publishes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .checkpoints.base_models import BaseModel
from .fusers.c2c import C2CFuser
from .modeling_c2c import C2CForCausalLM

# Name of a module of [`Projector`] -> name in the published layout, behind `key_` or `value_`.
_PARTS = {
    "in_proj": "in",
    "shared_ffn": "mlp1.blocks.0",
    "weight_ffn": "scalar_mlp2.blocks.0",
    "weight_proj": "scalar_head",
    "out_proj": "proj_out",
}
_FFN_WEIGHTS = {"norm.weight": "norm.weight", "up_proj.weight": "w1.weight", "down_proj.weight": "w2.weight"}


def convert_reference_checkpoint(
    checkpoint_dirs: str | Path | Sequence[str | Path],
    receiver: BaseModel | None = None,
    sharers: BaseModel | Sequence[BaseModel] | None = None,
    **kwargs: Any,
) -> C2CForCausalLM:
    """Build a model from fusers published by the reference implementation, one checkpoint per sharer.

    Args:
        checkpoint_dirs: Folders with `config.json`, and, there or in a subfolder `final`, `projector_config.json`,
            `projector_<i>.json` and `projector_<i>.pt`.
        receiver: The receiver. `None`: the one that the first `config.json` names.
        sharers: The sharers in the order of the checkpoints. `None`: those that the configurations name.
        **kwargs: Arguments of [`C2CForCausalLM.from_receiver_and_sharers`], such as `fusion_mode`.

    Returns:
        The model, with its fusers in float32.

    Raises:
        ValueError: A checkpoint is incomplete, of another kind or does not fit the models.
    """
    if isinstance(checkpoint_dirs, str | Path):
        checkpoint_dirs = [checkpoint_dirs]
    folders = [Path(folder) for folder in checkpoint_dirs]
    if not folders:
        raise ValueError("`checkpoint_dirs` must name at least one folder, but the list is empty.")
    model_sections = [_section(folder / "config.json", "model") for folder in folders]
    if receiver is None:
        receiver = _named_model(folders[0], model_sections[0], "base_model")
    if sharers is None:
        sharers = [
            _named_model(f, model_section, "teacher_model")
            for f, model_section in zip(folders, model_sections, strict=True)
        ]
    elif isinstance(sharers, str | Path | torch.nn.Module):
        sharers = [sharers]
    if len(sharers) != len(folders):
        raise ValueError(f"`sharers` must be as many as `checkpoint_dirs` ({len(folders)}), but got {len(sharers)}.")
    sizes = [_fuser_sizes(folder) for folder in folders]
    defaults: dict[str, Any] = {field: [own[field] for own in sizes] for field in sizes[0]}
    defaults["token_alignment"] = [_token_alignment(model_section) for model_section in model_sections]
    model = C2CForCausalLM.from_receiver_and_sharers(receiver, sharers, **{**defaults, **kwargs})
    for fuser, folder, sharer in zip(model.fuser, folders, model.config.sharers, strict=True):
        if type(fuser) is not C2CFuser:
            raise ValueError(
                f"`mode` must be 'fusion' and `fuser_type` 'c2c' for a reference checkpoint, but got "
                f"{model.config.mode!r} and {model.config.fuser_type!r}."
            )
        _load_projectors(fuser, folder, len(sharer.layer_shapes or []))
    return model.eval()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`checkpoint_dirs`: {path} is missing or no JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"`checkpoint_dirs`: {path} must hold a JSON object, but holds {type(content).__name__}.")
    return content


def _section(path: Path, key: str) -> dict[str, Any]:
    """Return the object under a key of a JSON file."""
    section = _read_json(path).get(key)
    if not isinstance(section, dict):
        raise ValueError(f"`checkpoint_dirs`: {path} must hold an object {key!r}, but holds {section!r} there.")
    return section


def _weights_folder(folder: Path) -> Path:
    return folder / "final" if (folder / "final").is_dir() else folder


def _named_model(folder: Path, model_section: dict[str, Any], key: str) -> str:
    name = model_section.get(key)
    if not isinstance(name, str):
        raise ValueError(f"`checkpoint_dirs`: {folder / 'config.json'} names no `{key}`; pass the model.")
    # Relative folders start at the checkpoint; any other name is a Hub id.
    local = folder / name
    return str(local.resolve()) if local.is_dir() else name


def _token_alignment(model_section: dict[str, Any]) -> str:
    return model_section.get("alignment_strategy", "first") if model_section.get("is_do_alignment") else "identity"


def _fuser_sizes(folder: Path) -> dict[str, Any]:
    path = _weights_folder(folder) / "projector_0.json"
    description = _read_json(path)
    if description.get("class") != "C2CProjector":
        raise ValueError(
            f"`checkpoint_dirs`: {path} describes a {description.get('class')!r}, but only 'C2CProjector' can be read."
        )
    arguments = _section(path, "init_args")
    try:
        return {
            "fuser_hidden_size": arguments["hidden_dim"],
            "fuser_intermediate_size": arguments["intermediate_dim"],
            "num_fuser_layers": arguments["num_layers"],
            "fuser_dropout": arguments["dropout"],
        }
    except KeyError as error:
        raise ValueError(f"`checkpoint_dirs`: {path} lacks {error} among its `init_args`.") from error


def _projector_indices(folder: Path, fuser: C2CFuser, num_sharer_layers: int) -> list[int]:
    """Return the index of each receiver layer's projector file, after checking the layer mapping."""
    path = _weights_folder(folder) / "projector_config.json"
    try:
        layers = _read_json(path)["0"]["1"]
        pairs = {int(layer): targets for layer, targets in layers.items()}
        if any(len(targets) != 1 for targets in pairs.values()):
            raise ValueError("several sharer layers for one receiver layer")
        mapping = [pairs[layer][0][0] for layer in range(fuser.num_layers)]
        indices = [int(pairs[layer][0][1]) for layer in range(fuser.num_layers)]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`checkpoint_dirs`: {path} holds no layer mapping for a receiver of {fuser.num_layers} layers "
            f"({error!r})."
        ) from error
    own_mapping = [sources[0] for sources in fuser.sources[: fuser.num_layers]]
    if mapping != own_mapping or len(pairs) != fuser.num_layers:
        raise ValueError(
            f"`checkpoint_dirs`: the layer mapping {mapping} of {path} is not the one of `layer_alignment` for "
            f"{fuser.num_layers} receiver and {num_sharer_layers} sharer layers, {own_mapping}."
        )
    return indices


@torch.no_grad()
def _load_projectors(fuser: C2CFuser, folder: Path, num_sharer_layers: int) -> None:
    for layer_idx, index in enumerate(_projector_indices(folder, fuser, num_sharer_layers)):
        path = _weights_folder(folder) / f"projector_{index}.pt"
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        # The exceptions of unpickling damaged bytes have no common class but this one.
        except Exception as error:
            raise ValueError(
                f"`checkpoint_dirs`: {path} is missing, damaged or holds more than weights ({type(error).__name__})."
            ) from error
        _check_tensors(weights, path)
        temperature = weights.pop("gate_temperature", None)
        if temperature is not None:
            if temperature.numel() != 1:
                raise ValueError(f"`checkpoint_dirs`: gate_temperature in {path} must be one number.")
            fuser.gate_temperature.copy_(temperature.reshape(()))
        for kind, entry in (("key", layer_idx), ("value", fuser.num_layers + layer_idx)):
            group, row = fuser.locate(entry)
            targets = dict(group.named_parameters())
            for name, target in targets.items():
                published_name = _published_name(kind, name)
                if published_name not in weights:
                    raise ValueError(f"`checkpoint_dirs`: {path} lacks the weight {published_name}.")
                value = weights.pop(published_name)
                if value.shape != target[row].shape:
                    raise ValueError(
                        f"`checkpoint_dirs`: {published_name} in {path} has shape {tuple(value.shape)}, but receiver "
                        f"and sharer need {tuple(target[row].shape)}."
                    )
                target[row].copy_(value)
        if weights:
            raise ValueError(f"`checkpoint_dirs`: {path} holds unknown weights: {sorted(weights)}.")


def _check_tensors(weights: object, path: Path) -> None:
    if not isinstance(weights, dict):
        raise ValueError(f"`checkpoint_dirs`: {path} must hold weights by their names, but holds {type(weights)}.")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"`checkpoint_dirs`: {name} in {path} must be a tensor, but is {type(value)}.")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"`checkpoint_dirs`: {name} in {path} holds numbers that are not finite.")


def _published_name(kind: str, name: str) -> str:
    """Return the name of a parameter of [`FuserGroup`] in the published layout."""
    if name == "gate.gate_logit":
        return f"{kind}_gate_logit"
    part, _, weight = name.removeprefix("projector.").partition(".")
    if part == "feature_ffns":
        block, _, weight = weight.partition(".")
        prefix = f"proj_mlp2.blocks.{block}"
    else:
        prefix = _PARTS[part]
    if part.endswith(("_ffn", "_ffns")):
        weight = _FFN_WEIGHTS[weight]
    return f"{kind}_{prefix}.{weight}"
