"""Base models and their tokenizers: loading, and the checks that they belong to a fuser."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from ..configuration_c2c import C2CConfig, one_per_sharer
from ..inference.fingerprints import fingerprint, tokenizer_hash, without_adapter
from ..inference.probe import probe_layer_shapes
from .download import HUB_KWARGS
from .receiver_adapter import unwrap_peft_model

logger = logging.getLogger(__name__)

#: Arguments that name the code of others, which runs only where `receiver_kwargs` or `sharer_kwargs` ask for it.
WITHOUT_CODE = {"trust_remote_code": False}
#: Arguments of a model's `from_pretrained` that its tokenizer's understands as well.
TOKENIZER_KWARGS = (*HUB_KWARGS, "code_revision", "gguf_file", "tokenizer_type", "trust_remote_code", "use_fast")
VERIFY_HINT = " Pass `verify_base_models=False` to use it all the same."

#: A loaded model, PEFT's included, or the Hub id or folder of one.
BaseModel: TypeAlias = str | Path | PreTrainedModel


class AbsentSharer(torch.nn.Module):
    """Stands for a sharer that runs elsewhere: its configuration without weights.

    Its cache comes as `sharer_caches`.

    Args:
        config: The sharer's configuration.
    """

    def __init__(self, config: PreTrainedConfig | None) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse to run.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "`sharer_caches` must be given, since the sharers were not loaded (`load_sharers=False`); prefill them "
            "elsewhere with `SharerCache.prefill`, or load them here."
        )

    get_input_embeddings = forward


def load_base_model(
    model: BaseModel, role: str, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, str | None, str | None]:
    """Load a receiver or sharer, or take one that is loaded.

    Args:
        model: Hub id, folder, or a loaded model, also PEFT's, whose adapter stays in the layers.
        role: `"receiver"` or `"sharers"`, for errors.
        model_kwargs: Go to the model's own `from_pretrained`.

    Returns:
        The model, its name or path (`None` if unknown) and its revision (a commit hash where one can be found).

    Raises:
        TypeError: Neither a name nor a model.
        ValueError: An absolute path names no folder, the model is a C2C model itself, or its adapter cannot be used.
    """
    if isinstance(model, torch.nn.Module):
        model = unwrap_peft_model(model, role)
        if isinstance(model.config, C2CConfig):
            raise ValueError(
                f"`{role}` must be a plain causal language model, but got a C2C model; hand over its receiver "
                "(`model.receiver`)."
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
        found: The value of the loaded model; `None` is not compared.
        hint: Advice appended to the error.

    Raises:
        ValueError: They differ.
    """
    if saved is not None and found is not None and saved != found:
        raise ValueError(
            f"`{role}`: this fuser was made for a model with {field} {saved}, but the model at hand has {found}; load "
            f"the base model that the fuser was trained with.{hint}"
        )


def load_base_models(
    config: C2CConfig,
    receiver: BaseModel | None,
    sharers: Sequence[BaseModel] | None,
    all_kwargs: Sequence[dict[str, Any]],
    load_sharers: bool,
    verify_revisions: bool,
) -> tuple[PreTrainedModel, list[PreTrainedModel | AbsentSharer]]:
    """Load the base models of a saved fuser.

    Args:
        config: Records names and revisions.
        receiver: A loaded receiver, or another place of the same. `None`: by the recorded name and revision.
        sharers: The same for the sharers, one per sharer.
        all_kwargs: Arguments of each model's own `from_pretrained`.
        load_sharers: `False`: no sharer is loaded, its configuration stands for it.
        verify_revisions: Compare the revisions found with those recorded.

    Returns:
        The receiver and the sharers.

    Raises:
        ValueError: Their number is wrong, a name is not recorded, or a revision is another one.
    """
    if sharers is not None and len(sharers) != config.num_sharers:
        raise ValueError(f"`sharers`: this fuser has {config.num_sharers} sharers, but got {len(sharers)}.")
    if not load_sharers:
        if sharers is not None:
            raise ValueError("`sharers` must be None with `load_sharers=False`.")
        if any(sharer.layer_shapes is None for sharer in config.sharers):
            raise ValueError(
                "`load_sharers` must be True, since the configuration does not record the sharers' shapes."
            )
    names = [config.receiver_name_or_path, *(sharer.name_or_path for sharer in config.sharers)]
    given: list[BaseModel | None] = [receiver, *(sharers or [None] * config.num_sharers)]
    loaded = []
    for index, (handed_over, name, recorded, kwargs) in enumerate(
        zip(given, names, recorded_kwargs(config), all_kwargs, strict=True)
    ):
        if index and not load_sharers:
            break
        role, base = "sharers" if index else "receiver", name if handed_over is None else handed_over
        if base is None:
            raise ValueError(f"`{role}`: the configuration records no name for it; hand over the model.")
        model, _, found = load_base_model(base, role, {**(recorded if handed_over is None else {}), **kwargs})
        # A model from elsewhere has commits of its own; its weights are compared.
        if verify_revisions and handed_over is None:
            check_base_model(role, "revision", recorded.get("revision"), found, VERIFY_HINT)
        loaded.append(model)
    absent = [] if load_sharers else [AbsentSharer(sharer.config) for sharer in config.sharers]
    return loaded[0], [*loaded[1:], *absent]


def recorded_kwargs(config: C2CConfig) -> list[dict[str, Any]]:
    """Return the arguments with which each base model was loaded when the fuser was built: the receiver's come first.

    A model is loaded again at the same revision, from the same GGUF file and quantized in the same way.
    """
    values = [
        (config.receiver_revision, config.receiver_gguf_file, config.receiver_config),
        *((sharer.revision, sharer.gguf_file, sharer.config) for sharer in config.sharers),
    ]
    return [
        {
            name: value
            for name, value in (
                ("revision", revision),
                ("gguf_file", gguf_file),
                ("quantization_config", getattr(nested, "quantization_config", None)),
            )
            if value is not None
        }
        for revision, gguf_file, nested in values
    ]


def verify_weights(
    config: C2CConfig, models: Sequence[PreTrainedModel | AbsentSharer], all_kwargs: Sequence[dict[str, Any]]
) -> None:
    """Compare the base models' weights with those recorded, or where they cannot be compared, the vocabularies.

    Args:
        config: Records fingerprints and hashes.
        models: The receiver, then the sharers.
        all_kwargs: Arguments with which each was loaded.

    Raises:
        ValueError: They differ.
    """
    recorded = [
        (config.receiver_fingerprint, config.receiver_tokenizer_hash),
        *((sharer.fingerprint, sharer.tokenizer_hash) for sharer in config.sharers),
    ]
    for index, (model, (expected, expected_hash), kwargs) in enumerate(zip(models, recorded, all_kwargs, strict=True)):
        role = "sharers" if index else "receiver"
        if isinstance(model, AbsentSharer):
            continue
        # An adapter comes with the fuser.
        expected, found = without_adapter(expected), without_adapter(fingerprint(model))
        check_base_model(role, "weights' fingerprint", expected, found, VERIFY_HINT)
        if found is not None and expected is not None:
            continue
        logger.warning(
            "The weights of %s %r were not compared with those that the fuser was trained with, because %s quantized, "
            "offloaded or in float16: make sure that it is the same model.",
            role,
            model.name_or_path,
            "they are" if found is None else "those were",
        )
        tokenizer = find_tokenizer(model.name_or_path or None, kwargs) if expected_hash is not None else None
        if tokenizer is not None:
            check_base_model(role, "vocabulary hash", expected_hash, tokenizer_hash(tokenizer), VERIFY_HINT)


def load_tokenizer(name: str | os.PathLike[str], model_kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer.

    Args:
        name: Hub id or folder.
        model_kwargs: Arguments of the model; those that concern weights are ignored.
    """
    kwargs = {key: value for key, value in model_kwargs.items() if key in TOKENIZER_KWARGS}
    return AutoTokenizer.from_pretrained(name, **{**WITHOUT_CODE, **kwargs})


def find_tokenizer(name: str | None, model_kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """Load a base model's tokenizer, see [`load_tokenizer`]; `None` where there is none."""
    if name is None:
        return None
    try:
        return load_tokenizer(name, model_kwargs)
    except (OSError, ValueError):
        # A model without a tokenizer serves as long as no alignment needs one, which is checked there.
        return None


def kwargs_per_sharer(
    sharer_kwargs: dict[str, Any] | Sequence[dict[str, Any]] | None, num_sharers: int
) -> list[dict[str, Any]]:
    """Return the loading arguments of each sharer: one dictionary for all, or one per sharer.

    Raises:
        ValueError: Their number is wrong.
    """
    given = list(sharer_kwargs) if isinstance(sharer_kwargs, Sequence) else sharer_kwargs or {}
    return one_per_sharer("sharer_kwargs", given, num_sharers)


def record_layer_shapes(
    config: C2CConfig, receiver: PreTrainedModel, sharers: Sequence[PreTrainedModel | AbsentSharer]
) -> None:
    """Measure the layer shapes of the base models, compare them with those recorded, and record them.

    Raises:
        ValueError: A model has no plain key/value cache, or other shapes than those recorded.
    """
    found = probe_layer_shapes(receiver, "receiver")
    _check_shapes("receiver", config.receiver_layer_shapes, found)
    config.receiver_layer_shapes = [list(shape) for shape in found]
    for sharer_config, sharer in zip(config.sharers, sharers, strict=True):
        if isinstance(sharer, PreTrainedModel):
            found = probe_layer_shapes(sharer, "sharers")
            _check_shapes("sharers", sharer_config.layer_shapes, found)
            sharer_config.layer_shapes = [list(shape) for shape in found]


def _check_shapes(role: str, saved: Sequence[Sequence[int]] | None, found: Sequence[Sequence[int]]) -> None:
    field = "layer shapes (key/value heads, key width, value width)"
    check_base_model(role, field, None if saved is None else summarize_shapes(saved), summarize_shapes(found))


def summarize_shapes(shapes: Sequence[Sequence[int]]) -> str:
    """Describe layer shapes in a few words: `30 x (3, 64, 64)`."""
    runs: list[list] = []
    for shape in shapes:
        if runs and runs[-1][1] == tuple(shape):
            runs[-1][0] += 1
        else:
            runs.append([1, tuple(shape)])
    return " + ".join(f"{count} x {shape}" for count, shape in runs)
