"""TRL: `C2CSFTTrainer` and `C2CSFTConfig` take the places of `SFTTrainer` and `SFTConfig`.

`SFTTrainer` itself cannot train a fuser, for two reasons. It keeps the receiver's tokens of a row alone, while the
sharers need the text. And it replaces the model's `forward` by one that runs `base_model` and multiplies the hidden
states of all positions by the output embeddings, while fusion happens between key/value caches, in a forward pass of
several models that has no hidden states of the fused region.
"""

from dataclasses import dataclass
from typing import Any

from trl import SFTConfig, SFTTrainer

from ..modeling_c2c import C2CForCausalLM
from ..training.arguments import C2CTrainingArguments
from ..training.trainer import C2CTrainer

#: Fields of `SFTConfig` that have no meaning here, with the values under which nothing is asked for.
_WITHOUT_MEANING: dict[str, tuple[object, ...]] = {
    "packing": (False,),
    "padding_free": (False,),
    "completion_only_loss": (None, True),
    "loss_type": ("nll",),
    "truncation_mode": ("keep_start",),
    "activation_offloading": (False,),
    "chat_template_path": (None,),
    "eos_token": (None,),
}


@dataclass
class C2CSFTConfig(C2CTrainingArguments, SFTConfig):
    """Arguments of [`C2CSFTTrainer`]: all fields of [`C2CTrainingArguments`], with its defaults, and of `SFTConfig`.

    Raises:
        ValueError: For a field of `SFTConfig` that a fuser's training has no use for, such as `packing`; and as
            [`C2CTrainingArguments`].
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in _WITHOUT_MEANING.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"`{name}` must be {allowed[0]!r}, but got {getattr(self, name)!r}: in the training of a fuser, "
                    "each row is one chat whose answers alone are learned."
                )
        # The rows are tokenized when they get there.
        self.dataset_kwargs = {"skip_prepare_dataset": True}


class C2CSFTTrainer(C2CTrainer, SFTTrainer):
    """A [`C2CTrainer`] that is an `SFTTrainer` of TRL: its callbacks, configuration and model cards take it for one.

    Args:
        model: The pair.
        args: Arguments of the run.
        *positional: Further arguments of [`C2CTrainer`].
        **kwargs: The same by name, and those of `SFTTrainer` but `formatting_func` and `quantization_config`.

    Raises:
        TypeError: `args` is of another class, or `formatting_func` is given.
        ValueError: As [`C2CTrainer`].
    """

    def __init__(self, model: C2CForCausalLM, args: C2CSFTConfig, *positional: Any, **kwargs: Any) -> None:
        if not isinstance(args, C2CSFTConfig):
            raise TypeError(
                f"`args` must be a C2CSFTConfig, which takes the same fields, but got {type(args).__name__}."
            )
        if kwargs.pop("formatting_func", None) is not None:
            raise TypeError("`formatting_func` must be None: apply it to the rows, to make their column `messages`.")
        super().__init__(model, args, *positional, **kwargs)
        # The method of the class, in place of the one that `SFTTrainer` has put in front of it.
        model.__dict__.pop("forward", None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the run; `SFTTrainer` asks for one with every checkpoint, which records the run itself."""
        if self._staging is None:
            super().create_model_card(*args, **kwargs)
