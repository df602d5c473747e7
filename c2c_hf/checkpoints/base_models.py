"""Loading of base models and their tokenizers, and the checks that they belong together."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from ..alignment.token_table import same_vocabulary
from ..configuration_c2c import C2CConfig, LayerShape
from ..hub.download import HUB_KWARGS
from ..inference.fingerprints import fingerprint, tokenizer_hash
from ..inference.prefill import probe_layer_shapes
from ..pretrained_processor import TOKENIZER_KWARGS, WITHOUT_CODE
from .absent_sharer import AbsentSharer

logger = logging.getLogger(__name__)

VERIFY_HINT = " Pass `verify_base_models=False` to use it all the same."
#: A loaded model, or the Hub id or folder of one.
BaseModel: TypeAlias = str | Path | PreTrainedModel


def load_base_model(
    model: str | Path | PreTrainedModel, role: str, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str | None, str | None]:
    """Load a receiver or sharer, or take one that is loaded.

    Args:
        model: Hub id, folder, or a loaded model.
        role: `"receiver"` or `"sharers"`, for errors.
        model_kwargs: Go to the model's own `from_pretrained`.

    Returns:
        The model, its name or path (`None` if unknown) and its revision (a commit hash where one can be found).

    Raises:
        TypeError: Neither a name nor a model.
        ValueError: The folder does not exist.
    """
    if isinstance(model, torch.nn.Module):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"`{role}` must be a transformers model, a Hub id or a folder, but got {type(model).__name__}."
            )
        return model, model.name_or_path or None, getattr(model.config, "_commit_hash", None)
    if not isinstance(model, str | Path):
        raise TypeError(
            f"`{role}` must be a transformers model, a Hub id or a folder, but got {type(model).__name__}."
        )
    name = str(model)
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(
            f"`{role}`: the folder {name!r} does not exist; hand over the model itself or the folder where it is now."
        )
    loaded = AutoModelForCausalLM.from_pretrained(name, **{**WITHOUT_CODE, **model_kwargs})
    return loaded, name, resolve_revision(name, model_kwargs)


def resolve_revision(name: str, model_kwargs: dict[str, Any]) -> str | None:
    """Return the commit from which a Hub model was loaded, or the revision asked for, or `None` for a folder."""
    if Path(name).is_dir():
        return None
    hub_kwargs = {key: value for key, value in model_kwargs.items() if key in HUB_KWARGS}
    path = cached_file(name, "config.json", **hub_kwargs, _raise_exceptions_for_missing_entries=False)
    commit = re.search(r"snapshots/([0-9a-f]{40})/", Path(path).as_posix()) if path else None
    return commit.group(1) if commit else model_kwargs.get("revision")


def check_base_model(role: str, field: str, saved: object, found: object, hint: str = "") -> None:
    """Refuse a base model that differs from the one that the fuser was made for.

    Args:
        role: Names the model in the error.
        field: What is compared.
        saved: The value in the configuration; `None` is not compared.
        found: The value of the model at hand; `None` is not compared.
        hint: How to go on all the same.

    Raises:
        ValueError: They differ.
    """
    if saved is not None and found is not None and saved != found:
        raise ValueError(
            f"`{role}`: this fuser was made for a model with {field} {saved}, but the model at hand has {found}; load "
            f"the base model that the fuser was trained with.{hint}"
        )


def verify_base_model(
    role: str,
    model: PreTrainedModel | AbsentSharer,
    recorded_fingerprint: str | None,
    recorded_hash: str | None,
    model_kwargs: dict[str, Any],
) -> None:
    """Compare a base model's weights with those recorded, or where they cannot be compared, its vocabulary.

    Raises:
        ValueError: They differ.
    """
    if isinstance(model, AbsentSharer):
        return
    found = fingerprint(model)
    check_base_model(role, "weights' fingerprint", recorded_fingerprint, found, VERIFY_HINT)
    if found is not None or recorded_fingerprint is None:
        return
    logger.warning("The weights of %s %r were not compared (see `fingerprint`).", role, model.name_or_path)
    tokenizer = load_tokenizer(model.name_or_path or None, model_kwargs) if recorded_hash is not None else None
    if tokenizer is not None:
        check_base_model(role, "vocabulary hash", recorded_hash, tokenizer_hash(tokenizer), VERIFY_HINT)


def per_sharer_kwargs(
    sharer_kwargs: dict[str, Any] | Sequence[dict[str, Any]] | None, num_sharers: int
) -> list[dict[str, Any]]:
    """Spread one dictionary of arguments over all sharers, or check that there is one per sharer."""
    if sharer_kwargs is None or isinstance(sharer_kwargs, dict):
        return [sharer_kwargs or {}] * num_sharers
    if len(sharer_kwargs) != num_sharers:
        raise ValueError(
            f"`sharer_kwargs` must be one dictionary or one per sharer ({num_sharers}), but got {len(sharer_kwargs)}."
        )
    return list(sharer_kwargs)


def load_tokenizer(name: str | None, model_kwargs: dict[str, Any]) -> Any:
    """Load the tokenizer beside a base model; `None` where there is none."""
    if name is None:
        return None
    kwargs = {key: value for key, value in model_kwargs.items() if key in TOKENIZER_KWARGS}
    try:
        return AutoTokenizer.from_pretrained(name, **{**WITHOUT_CODE, **kwargs})
    except (OSError, ValueError):
        # A model without a tokenizer is fine as long as no alignment needs one, which is checked where it does.
        return None


def resolve_alignments(
    token_alignment: str | Sequence[str] | None, models: Sequence[PreTrainedModel], tokenizers: Sequence[Any]
) -> list[str]:
    """Choose each sharer's alignment, and refuse `identity` between different vocabularies."""
    if token_alignment is None or isinstance(token_alignment, str):
        wished: list[str | None] = [token_alignment] * (len(models) - 1)
    else:
        wished = list(token_alignment)
    if len(wished) != len(models) - 1:
        raise ValueError(
            f"`token_alignment` needs one value, or one per sharer ({len(models) - 1}), but got {wished!r}."
        )
    sizes = [model.get_input_embeddings().weight.shape[0] for model in models]
    resolved = []
    for index, alignment in enumerate(wished, start=1):
        if tokenizers[0] is not None and tokenizers[index] is not None:
            # A receiver's added token is harmless to a sharer that lacks it, if there is an embedding for its id.
            same = same_vocabulary(tokenizers[0], tokenizers[index]) and len(tokenizers[0]) <= sizes[index]
        else:
            same = sizes[0] == sizes[index]
        if alignment == "identity" and not same:
            raise ValueError(
                "`token_alignment='identity'` needs receiver and sharer to have the same vocabulary, but those of "
                f"{type(models[0]).__name__} ({sizes[0]} tokens) and {type(models[index]).__name__} ({sizes[index]} "
                "tokens) differ; use 'span', 'first' or 'longest'."
            )
        resolved.append(alignment or ("identity" if same else "span"))
    return resolved


def base_models_to_load(
    config: C2CConfig,
    receiver: BaseModel | None,
    sharers: BaseModel | Sequence[BaseModel] | None,
    load_sharers: bool = True,
) -> list[BaseModel | AbsentSharer]:
    """Take the base models handed over, and the recorded names of the others.

    Raises:
        ValueError: Their number is wrong, or a name is not recorded.
    """
    names: list[Any] = [config.receiver_name_or_path if receiver is None else receiver]
    if not load_sharers:
        if any(sharer.layer_shapes is None for sharer in config.sharers):
            raise ValueError(
                "`load_sharers` must be True, since the configuration does not record the sharers' shapes."
            )
        names += [AbsentSharer(sharer.config) for sharer in config.sharers]
    elif sharers is None:
        names += [sharer.name_or_path for sharer in config.sharers]
    else:
        names += [sharers] if isinstance(sharers, str | Path | PreTrainedModel) else list(sharers)
    if len(names) != config.num_sharers + 1:
        raise ValueError(f"`sharers`: this fuser has {config.num_sharers} sharers, but got {len(names) - 1}.")
    for index, name in enumerate(names):
        if name is None:
            role = "sharers" if index else "receiver"
            raise ValueError(f"`{role}`: the configuration records no name for it; hand over the model.")
    return names


def record_layer_shapes(
    config: C2CConfig, receiver: PreTrainedModel, sharers: Sequence[PreTrainedModel | AbsentSharer]
) -> tuple[list[LayerShape], list[list[LayerShape]]]:
    """Read the layer shapes off the base models, compare them with those recorded, and record them.

    Raises:
        ValueError: A model has no plain key/value cache, or other shapes than those recorded.
    """
    receiver_shapes = probe_layer_shapes(receiver, "receiver")
    recorded_shapes: list[Any] = [sharer.layer_shapes for sharer in config.sharers]
    sharer_shapes: list[list[LayerShape]] = [
        list(saved) if isinstance(sharer, AbsentSharer) else probe_layer_shapes(sharer, "sharers")
        for sharer, saved in zip(sharers, recorded_shapes, strict=True)
    ]
    field = "layer shapes (key/value heads, key width, value width)"
    roles = ["receiver", *["sharers"] * len(sharer_shapes)]
    recorded = [config.receiver_layer_shapes, *recorded_shapes]
    for role, saved, found in zip(roles, recorded, [receiver_shapes, *sharer_shapes], strict=True):
        check_base_model(role, field, None if saved is None else summarize_shapes(saved), summarize_shapes(found))
    config.receiver_layer_shapes = [list(shape) for shape in receiver_shapes]
    for sharer_config, shapes in zip(config.sharers, sharer_shapes, strict=True):
        sharer_config.layer_shapes = [list(shape) for shape in shapes]
    return receiver_shapes, sharer_shapes


def summarize_shapes(shapes: Sequence[Sequence[int]]) -> str:
    """Describe layer shapes in a few words: `30 x (3, 64, 64)`."""
    runs: list[list] = []
    for shape in shapes:
        if runs and runs[-1][1] == tuple(shape):
            runs[-1][0] += 1
        else:
            runs.append([1, tuple(shape)])
    return " + ".join(f"{count} x {shape}" for count, shape in runs)
