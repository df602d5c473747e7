"""What `c2c train` reads: a YAML file and overrides of its fields."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from peft import LoraConfig
from transformers import HfArgumentParser

from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .arguments import C2CTrainingArguments
from .dataset import DataArguments


@dataclass
class ModelArguments:
    """Which pair `c2c train` trains.

    Args:
        receiver: Hub id or folder of the model that answers.
        sharers: Hub ids or folders of the models that lend their states.
        demo_pair: Train the pair that installs from PyPI, SmolLM2-135M-Instruct and Gemma 3 270M.
        fuser: Hub id or folder of a fuser to go on with; it names its base models.
        load_sharers: Off, the sharers of that fuser stay on their disk: what they have read is in `sharer_cache_dir`.
        dtype: Precision of the base models; the fuser stays in float32.
        attn_implementation: Of the base models.
        device_map: Placement of each base model.
        receiver_kwargs: Further arguments of the receiver's `from_pretrained`.
        sharer_kwargs: The same for the sharers.
        token_alignment: This and the following: see [`C2CConfig`].
        layer_alignment: See there.
        fusion_mode: See there.
        fuser_hidden_size: See there.
        fuser_intermediate_size: See there.
        num_fuser_layers: See there.
        fuser_dropout: See there.
        fuser_initialization: See there.
        initial_gate_temperature: See there.
        final_gate_temperature: See there.
        lora_rank: Train a LoRA of this rank on the receiver, too (with `train_fuser: false` nothing else).
        lora_alpha: Its scale; default twice the rank.
        lora_dropout: Its dropout.
        lora_target_modules: Names of the layers that get one; default every linear layer.

    Raises:
        ValueError: No pair is named, or two are; or `load_sharers: false` without a fuser.
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
    token_alignment: str | None = None
    layer_alignment: str = "terminal"
    fusion_mode: str = "parallel"
    fuser_hidden_size: int = 1024
    fuser_intermediate_size: int = 1024
    num_fuser_layers: int = 3
    fuser_dropout: float = 0.1
    fuser_initialization: str = "closed_gates"
    initial_gate_temperature: float = 1.0
    final_gate_temperature: float = 0.001
    lora_rank: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("receiver_kwargs", "sharer_kwargs"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else value or {})
        named = [bool(self.receiver and self.sharers), self.demo_pair, bool(self.fuser)]
        if sum(named) != 1:
            raise ValueError("Name one pair: `receiver` and `sharers`, or `fuser`, or `demo_pair: true`.")
        if not self.load_sharers and not self.fuser:
            raise ValueError("`load_sharers: false` needs a `fuser`, which knows the shapes of its sharers.")

    def load(self, demo_pair: tuple[str, str] | None = None) -> tuple[C2CForCausalLM, C2CProcessor]:
        """Build or load the pair.

        Args:
            demo_pair: Folders of the demo pair, where that is asked for.
        """
        shared = ("dtype", "attn_implementation", "device_map")
        kwargs = {name: getattr(self, name) for name in shared if getattr(self, name) is not None}
        base_kwargs: dict[str, Any] = {
            name: {**kwargs, **getattr(self, name)} for name in ("receiver_kwargs", "sharer_kwargs")
        }
        model: Any
        if self.fuser is not None:
            model = C2CForCausalLM.from_pretrained(self.fuser, load_sharers=self.load_sharers, **base_kwargs)
            return model, C2CProcessor.from_pretrained(self.fuser)
        pair: Any = (self.receiver, self.sharers) if demo_pair is None else demo_pair
        names = (
            "token_alignment",
            "layer_alignment",
            "fusion_mode",
            "fuser_hidden_size",
            "fuser_intermediate_size",
            "num_fuser_layers",
            "fuser_dropout",
            "fuser_initialization",
            "initial_gate_temperature",
            "final_gate_temperature",
        )
        fields: dict[str, Any] = {name: getattr(self, name) for name in names}
        fields.update(base_kwargs, receiver=pair[0], sharers=pair[1])
        model = C2CForCausalLM.from_receiver_and_sharers(**fields)
        processor = C2CProcessor.from_receiver_and_sharers(pair[0], pair[1], self.token_alignment, **base_kwargs)
        return model, processor

    def peft_config(self) -> LoraConfig | None:
        """Return the adapter that is asked for, if one is."""
        if self.lora_rank is None:
            return None
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `c2c train CONFIG --help` lists all fields.")


def training_parser() -> HfArgumentParser:
    """Return the parser of all fields of `c2c train`."""
    return _Parser([ModelArguments, DataArguments, C2CTrainingArguments], prog="c2c train CONFIG", allow_abbrev=False)


def parse_training_config(
    config: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[ModelArguments, DataArguments, C2CTrainingArguments]:
    """Read a YAML file and overrides such as `["--learning_rate", "3e-4"]`, which go before it.

    Args:
        config: The file, with the fields of all three classes side by side; `None`: overrides alone.
        overrides: Words of a command line.

    Raises:
        ValueError: The file is no mapping, or a field or value is unknown.
    """
    parser = training_parser()
    if config is not None:
        fields = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"{str(config)!r} must hold `field: value` lines, but holds {type(fields).__name__}.")
        known = {action.dest for action in parser._actions}
        if unknown := sorted(fields.keys() - known):
            raise ValueError(f"{str(config)!r} has unknown fields: {', '.join(map(str, unknown))}.")
        # Defaults that are text are parsed as on the command line: YAML reads 1e-4 as text.
        parser.set_defaults(**fields)
    return parser.parse_args_into_dataclasses(list(overrides), look_for_args_file=False)
