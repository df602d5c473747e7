"""Recipes: the YAML files that `c2c train` takes, with the fields of three classes side by side.

[`ModelArguments`] names the pair and the fuser's sizes, [`DataArguments`] the data, [`C2CTrainingArguments`] the
optimization and the losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from peft import LoraConfig
from transformers import HfArgumentParser

from ..demo import from_pretrained, local_pair
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .arguments import C2CTrainingArguments, check_positive, parse_json
from .dataset import is_file_name, load_rows, prepare_dataset
from .passages import exclude_overlaps, rows_word_runs

#: Fields of [`ModelArguments`] that are fields of the configuration.
_CONFIG_FIELDS = (
    "fuser_type",
    "layer_alignment",
    "fusion_source_layers",
    "joint_keys_values",
    "unrotate_keys",
    "shared_hidden_size",
    "shared_num_layers",
    "fusion_mode",
    "fuser_initialization",
    "initial_gate_temperature",
    "final_gate_temperature",
)
#: Those that a configuration has once per sharer.
_SHARER_FIELDS = (
    "token_alignment",
    "fuser_hidden_size",
    "fuser_intermediate_size",
    "num_fuser_layers",
    "fuser_dropout",
)


@dataclass
class ModelArguments:
    """The pair that `c2c train` trains.

    Args:
        receiver: Hub id or folder of the receiver.
        sharers: Hub ids or folders of the sharers.
        demo_pair: Train the pair that installs from PyPI, SmolLM2-135M-Instruct and Gemma 3 270M.
        fuser: Hub id or folder of a fuser whose training continues, which names its base models; or `general` or
            `memory`, which come with this package.
        load_sharers: `False`: the sharers of that fuser are not loaded; their caches are in `sharer_cache_dir`.
        dtype: Precision of the base models; the fuser stays in float32.
        attn_implementation: Of the base models.
        device_map: Placement of each base model.
        receiver_kwargs: Further arguments of the receiver's `from_pretrained`.
        sharer_kwargs: Further arguments of each sharer's `from_pretrained`.
        fuser_type: This and the following, see [`C2CConfig`]. `None`: as there, or as the `fuser` has it.
        layer_alignment: See [`C2CConfig`].
        fusion_source_layers: See [`C2CConfig`].
        joint_keys_values: See [`C2CConfig`].
        unrotate_keys: See [`C2CConfig`].
        shared_hidden_size: See [`C2CConfig`].
        shared_num_layers: See [`C2CConfig`].
        fusion_mode: See [`C2CConfig`].
        fuser_initialization: See [`C2CConfig`].
        initial_gate_temperature: See [`C2CConfig`].
        final_gate_temperature: See [`C2CConfig`].
        token_alignment: This and the following, one for all sharers or one per sharer, see [`SharerConfig`]. `None`:
            as there, or as the `fuser` has it.
        fuser_hidden_size: See [`SharerConfig`].
        fuser_intermediate_size: See [`SharerConfig`].
        num_fuser_layers: See [`SharerConfig`].
        fuser_dropout: See [`SharerConfig`].
        lora_rank: Train a LoRA of this rank on the receiver as well (with `train_fuser: false` instead). `None`: none.
        lora_alpha: Its scale. `None`: twice the rank.
        lora_dropout: Its dropout.
        lora_target_modules: Names of the layers that get one. `None`: every linear layer.

    Raises:
        ValueError: No pair is named, or two are; an unknown `dtype`; or `load_sharers: false` without a fuser.
    """

    receiver: str | None = None
    sharers: list[str] | None = None
    demo_pair: bool = False
    fuser: str | None = None
    load_sharers: bool = True
    dtype: str = "float32"
    attn_implementation: str | None = None
    device_map: str | None = None
    receiver_kwargs: dict | str | None = None
    sharer_kwargs: dict | str | None = None
    fuser_type: str | None = None
    layer_alignment: str | None = None
    fusion_source_layers: int | None = None
    joint_keys_values: bool | None = None
    unrotate_keys: bool | None = None
    shared_hidden_size: int | None = None
    shared_num_layers: int | None = None
    fusion_mode: str | None = None
    fuser_initialization: str | None = None
    initial_gate_temperature: float | None = None
    final_gate_temperature: float | None = None
    token_alignment: list[str] | None = None
    fuser_hidden_size: list[int] | None = None
    fuser_intermediate_size: list[int] | None = None
    num_fuser_layers: list[int] | None = None
    fuser_dropout: list[float] | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("receiver_kwargs", "sharer_kwargs"):
            setattr(self, name, parse_json(getattr(self, name)))
        for name in ("sharers", *_SHARER_FIELDS):
            value = getattr(self, name)
            # YAML files may name a single one without brackets.
            setattr(self, name, [value] if isinstance(value, str | int | float) else value)
        named = [bool(self.receiver and self.sharers), self.demo_pair, bool(self.fuser)]
        if sum(named) != 1:
            raise ValueError("Name one pair: `receiver` and `sharers`, or `fuser`, or `demo_pair: true`.")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be 'auto' or a dtype of torch such as 'bfloat16', but got {self.dtype!r}.")
        if not self.load_sharers and not self.fuser:
            raise ValueError("`load_sharers: false` needs a `fuser`, which knows the shapes of its sharers.")

    def load(self) -> tuple[C2CForCausalLM, C2CProcessor]:
        """Build or load the pair."""
        shared = {
            name: value
            for name in ("dtype", "attn_implementation", "device_map")
            if (value := getattr(self, name)) is not None
        }
        receiver_kwargs, sharer_kwargs = (
            {**shared, **parse_json(kwargs)} for kwargs in (self.receiver_kwargs, self.sharer_kwargs)
        )
        given = self.config_fields()
        if self.fuser is not None:
            return from_pretrained(
                self.fuser,
                receiver_kwargs=receiver_kwargs,
                sharer_kwargs=sharer_kwargs,
                load_sharers=self.load_sharers,
                **given,
            )
        if self.receiver is None or self.sharers is None:
            receiver, *sharers = local_pair()
        else:
            receiver, sharers = self.receiver, self.sharers
        model = C2CForCausalLM.from_receiver_and_sharers(receiver, sharers, receiver_kwargs, sharer_kwargs, **given)
        processor = C2CProcessor.from_receiver_and_sharers(
            receiver,
            sharers,
            given.get("token_alignment"),
            receiver_kwargs=receiver_kwargs,
            sharer_kwargs=sharer_kwargs,
        )
        return model, processor

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of the configuration that are given."""
        given = {name: getattr(self, name) for name in _CONFIG_FIELDS}
        for name in _SHARER_FIELDS:
            values = getattr(self, name)
            given[name] = values[0] if values is not None and len(values) == 1 else values
        return {name: value for name, value in given.items() if value is not None}

    def peft_config(self) -> LoraConfig | None:
        """Return the configuration of the adapter; `None` without `lora_rank`."""
        if self.lora_rank is None:
            return None
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )


@dataclass
class DataArguments:
    """The data that `c2c train` trains on; see [`training.dataset`] for the kinds of rows.

    Args:
        train_data: JSON Lines files (`.jsonl`, `.jsonl.gz`) and Hub ids; several are concatenated.
        train_weights: Share of the examples of each training data set, in any unit; those that are used up start again
            until the last one is. `None`: all examples, once per epoch.
        excluded_data: Files and Hub ids, test sets say: training rows whose texts have 20 words in a row in common
            with them are left out.
        eval_data: The same as `train_data` for evaluation.
        dataset_config: Configuration name of the Hub data sets.
        train_split: Split of the Hub data sets to train on, slices such as `train[:1000]` included.
        eval_split: Split of the Hub data sets to evaluate on, and of those in `excluded_data`.
        max_train_rows: Use the first rows of each training data set only. `None`: all.
        max_eval_rows: The same for evaluation.
        streaming: Load training data while training; needs `max_steps`.
        shuffle_buffer_size: Number of streamed examples among which the next is drawn.

    Raises:
        ValueError: For an unknown value, naming the field, the value and what is allowed.
    """

    train_data: list[str] = field(default_factory=list)
    train_weights: list[float] | None = None
    excluded_data: list[str] = field(default_factory=list)
    eval_data: list[str] = field(default_factory=list)
    dataset_config: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    streaming: bool = False
    shuffle_buffer_size: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "max_train_rows", "max_eval_rows", "shuffle_buffer_size")
        weights = self.train_weights
        if weights is not None and (len(weights) != len(self.train_data) or not all(w > 0 for w in weights)):
            raise ValueError(
                f"`train_weights` must hold a number above 0 for each of the {len(self.train_data)} `train_data`, but "
                f"got {weights}."
            )

    def hub_ids(self) -> list[str]:
        """Return which of the training data are on the Hub."""
        return [name for name in self.train_data if not is_file_name(name)]

    def load(
        self, processor: C2CProcessor, arguments: C2CTrainingArguments
    ) -> tuple[Dataset | IterableDataset, Dataset | None]:
        """Load and tokenize all data.

        Args:
            processor: The pair's.
            arguments: How rows are tokenized; the seed is also that of the shuffling of streamed data and of the
                mixture by weights.

        Returns:
            Training data, and evaluation data or `None`.

        Raises:
            ValueError: There are no training data, or bad rows.
        """
        if not self.train_data:
            raise ValueError("`train_data` must name at least one file or Hub id, but is empty.")
        excluded: set[int] = set()
        for name in self.excluded_data:
            excluded |= rows_word_runs(load_rows(name, self.eval_split, self.dataset_config))
        train = [
            self._load(name, self.train_split, self.max_train_rows, self.streaming, processor, arguments, excluded)
            for name in self.train_data
        ]
        evaluation = [
            self._load(name, self.eval_split, self.max_eval_rows, False, processor, arguments, set())
            for name in self.eval_data
        ]
        if self.train_weights is None:
            train_data = concatenate_datasets(train)
        else:
            shares = [weight / sum(self.train_weights) for weight in self.train_weights]
            train_data = interleave_datasets(train, shares, arguments.seed, stopping_strategy="all_exhausted")
        if self.streaming:
            train_data = train_data.shuffle(seed=arguments.seed, buffer_size=self.shuffle_buffer_size)
        return train_data, concatenate_datasets(evaluation) if evaluation else None

    def _load(
        self,
        name: str,
        split: str,
        max_rows: int | None,
        streaming: bool,
        processor: C2CProcessor,
        arguments: C2CTrainingArguments,
        excluded: set[int],
    ) -> Dataset | IterableDataset:
        rows = load_rows(name, split, self.dataset_config, streaming)
        if max_rows is not None:
            rows = rows.take(max_rows) if streaming else rows.select(range(min(max_rows, len(rows))))
        if excluded:
            rows = exclude_overlaps(rows, excluded, name)
        return prepare_dataset(rows, processor, name=name, **arguments.tokenization())


_DATACLASSES = (ModelArguments, DataArguments, C2CTrainingArguments)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `c2c train CONFIG --help` lists all fields.")


def recipe_parser() -> HfArgumentParser:
    """Return the parser of all fields of a recipe."""
    return _Parser(_DATACLASSES, prog="c2c train CONFIG", allow_abbrev=False)


def parse_recipe(
    recipe: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[ModelArguments, DataArguments, C2CTrainingArguments]:
    """Parse a recipe, and overrides such as `["--learning_rate", "3e-4"]`, which replace its values.

    Args:
        recipe: The YAML file; `None`: overrides alone.
        overrides: Words of a command line.

    Raises:
        ValueError: The file is not YAML or no mapping, or a field or value is unknown.
        OSError: The file cannot be read.
    """
    parser = recipe_parser()
    if recipe is not None:
        try:
            values = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{str(recipe)!r} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{str(recipe)!r} must hold `field: value` lines, but holds {type(values).__name__}.")
        known = {each.name for arguments in _DATACLASSES for each in fields(arguments) if each.init}
        if unknown := sorted(map(str, values.keys() - known)):
            raise ValueError(f"{str(recipe)!r} has unknown fields: {', '.join(unknown)}.")
        # Defaults that are text are parsed as on the command line: YAML takes 1e-4 for text.
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(list(overrides), look_for_args_file=False)
