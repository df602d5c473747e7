"""`C2CTrainingArguments`: a training run's fields, their defaults and what they mean."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..fusers.c2c import GATE_NOISES

#: What each preset means for the fields that are left at `None`.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"gate_noise": "logistic", "min_fused_fraction": 1.0, "guard_weight": 0.0, "choice_weight": 0.0},
    "paper": {"gate_noise": "gumbel", "min_fused_fraction": 1.0, "guard_weight": 0.0, "choice_weight": 0.0},
}


@dataclass
class C2CTrainingArguments(TrainingArguments):
    """Arguments of [`C2CTrainer`]: those of [`~transformers.TrainingArguments`] and the following.

    Args:
        max_length: Largest number of tokens of an example, see [`~training_data.prepare_dataset`].

        preset: `"paper"`: as in arXiv 2510.03215; `"default"`: what we found better. A preset fills the fields below
            that are left at `None`.
        gate_noise: Noise of the gates in training: `"gumbel"`, one-sided, the paper's; `"logistic"`, two-sided, so
            that a gate at logit 0 is open half of the time; or `"none"`. Default `"logistic"`, paper `"gumbel"`.
        min_fused_fraction: Each row of a batch fuses one random contiguous share of its alignable positions, drawn
            between this and 1. 1: always all of them. Default and paper 1.
        guard_weight: Weight of the guard loss: the divergence KL(receiver alone || fused) over the answer tokens, per
            token, where every row's sharers read the text of another row in the batch (the k-th fused position reads
            what that row's k-th reads, from the start again at its end). It teaches the fuser not to draw on sharers
            that read something else. Costs two more passes of the receiver. 0: off. Default and paper 0.
        choice_weight: Weight of the choice loss of multiple choice questions: the cross-entropy of the right answer
            among all, each scored by its mean log-likelihood per token (the length-normalised loss of arXiv
            2205.05638), one per question, added to the sum over the answer tokens before that is averaged. Needs an
            answer format that tells choices apart, such as `"text"`. 0: off. Default and paper 0.
        sharer_cache_dir: Folder in which the sharers' states of every row are kept, so that later epochs and runs load
            them in place of running the sharers; with all of them there the sharers need not be loaded
            (`load_sharers=False`). A row takes as much space as the sharer's cache of its text: 2 x layers x key/value
            heads x head_dim x tokens numbers. `None`: nothing is kept.
        sharer_cache_int8: Keep them in 8 bits.
        train_fuser: Off, the fuser stays as it is and fusion is off: what is left to train is the `peft_config` of
            [`C2CTrainer`], the baseline of a receiver that was tuned on the same data without any sharer.

    Defaults that differ from those of [`~transformers.TrainingArguments`]:

    | field | here | there | |
    | --- | --- | --- | --- |
    | `learning_rate` | 1e-4 | 5e-5 | the paper's |
    | `warmup_steps` | 0.1 | 0 | the paper's 10 % |
    | `weight_decay` | 0.01 | 0 | the paper's |
    | `logging_steps` | 10 | 500 | |
    | `logging_nan_inf_filter` | `False` | `True` | a loss that is not finite stops the run |
    | `remove_unused_columns` | `False` | `True` | the collator picks its columns |
    | `ddp_find_unused_parameters` | `False` | `None` | every parameter of the fuser is used |
    | `ddp_broadcast_buffers` | `False` | `None` | buffers are the same everywhere |
    | `accelerator_config` | `{"dispatch_batches": False}` | `None` | streamed batches differ in width |

    Raises:
        ValueError: For an unknown value, naming the field, the value and what is allowed.
    """

    # Data
    max_length: int = field(default=2048, metadata={"help": "Largest number of tokens of an example."})

    # Method
    preset: str = field(default="default", metadata={"help": f"One of {', '.join(PRESETS)}."})
    gate_noise: str | None = field(default=None, metadata={"help": f"One of {', '.join(GATE_NOISES)}."})
    min_fused_fraction: float | None = field(default=None, metadata={"help": "Smallest share of positions that fuse."})
    guard_weight: float | None = field(default=None, metadata={"help": "Weight of the guard loss."})
    choice_weight: float | None = field(default=None, metadata={"help": "Weight of the choice loss."})
    sharer_cache_dir: str | None = field(default=None, metadata={"help": "Folder for the sharers' states."})
    sharer_cache_int8: bool = field(default=False, metadata={"help": "Keep these states in 8 bits."})
    train_fuser: bool = field(default=True, metadata={"help": "Off: train the receiver's adapter alone."})

    # Optimization
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warmup; below 1 a share of all."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})

    # Logging
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1 a share of all."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave losses that are not finite out."})

    # Data loading and distribution
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must stay off."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Search for unused parameters."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Broadcast buffers in each step."})
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False}, metadata={"help": "Settings of accelerate."}
    )

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {list(PRESETS)}, but got {self.preset!r}.")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if self.gate_noise not in GATE_NOISES:
            raise ValueError(f"`gate_noise` must be one of {list(GATE_NOISES)}, but got {self.gate_noise!r}.")
        if self.min_fused_fraction is None or not 0.0 < self.min_fused_fraction <= 1.0:
            raise ValueError(f"`min_fused_fraction` must be in (0, 1], but got {self.min_fused_fraction!r}.")
        for name in ("guard_weight", "choice_weight"):
            value = getattr(self, name)
            if value is None or not value >= 0.0:
                raise ValueError(f"`{name}` must be at least 0, but got {value!r}.")
        if self.choice_weight and self.label_smoothing_factor:
            raise ValueError("`choice_weight` and `label_smoothing_factor` do not go together: set one of them to 0.")
        if self.guard_weight and self.per_device_train_batch_size < 2:
            raise ValueError(
                "`guard_weight` needs other rows in the batch: `per_device_train_batch_size` must be at least 2, but "
                f"got {self.per_device_train_batch_size}."
            )
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, but got {self.max_length!r}.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False, but got True: the collator picks its columns.")
