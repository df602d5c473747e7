"""`C2CTrainingArguments`: a training run's fields, their defaults and what they mean."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..configuration_c2c import check_choice
from ..fusers.c2c import GATE_NOISES
from .tokenization import ANSWER_FORMATS, QUESTION_TEMPLATE

#: The gate noise of each preset; in all else they are the same.
PRESETS = {"default": "logistic", "paper": "gumbel"}
#: Weights of the losses.
_WEIGHTS = ("answer_weight", "continuation_weight", "distillation_weight", "guard_weight", "choice_weight")
#: Fields that are arguments of `prepare_dataset`.
_TOKENIZATION_FIELDS = (
    *("max_length", "answer_format", "question_template", "plain_text", "plain_choices", "chat_template_kwargs"),
    *("continuation_length", "min_prefix_length", "max_prefix_length", "seed"),
)


def parse_json(value: dict | str | None) -> dict[str, Any]:
    """Return a dictionary, which a command line gives as JSON."""
    return json.loads(value) if isinstance(value, str) else value or {}


def check_positive(arguments: object, *names: str) -> None:
    """Check that fields are at least 1, or `None`.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but got {value!r}.")


@dataclass
class C2CTrainingArguments(TrainingArguments):
    """Arguments of [`C2CTrainer`]: those of [`~transformers.TrainingArguments`] and the following.

    Args:
        max_length: Largest number of tokens of an example, see [`~training.dataset.prepare_dataset`].
        dataset_num_proc: Processes that tokenize; not used for streamed data. `None`: this one.
        answer_format: Answer to a multiple choice question: `"letter"`, `"text"` of the choice, or `"both"`.
        question_template: Prompt of a multiple choice question, with `{question}` and, unless the answer is a
            `"text"`, `{choices}`.
        plain_text: Take prompts as plain text although the receiver has a chat template.
        plain_choices: The same for multiple choice only.
        chat_template_kwargs: Arguments of the chat templates, such as `{"enable_thinking": false}`.
        continuation_length: Of `text` rows: largest number of receiver tokens to continue with.
        min_prefix_length: Smallest number of receiver tokens in front of them.
        max_prefix_length: Largest number of them. `None`: as many as fit in `max_length`.
        preset: `"paper"`: as in arXiv 2510.03215; `"default"`: what works better in the package's own experiments. It
            decides `gate_noise` where that is `None`.
        gate_noise: Noise of the gates in training: `"gumbel"`, one-sided, as in the paper; `"logistic"`, two-sided, so
            that a gate at logit 0 is open half of the time; or `"none"`. `None`: the preset's, `"gumbel"` for
            `"paper"`, `"logistic"` for `"default"`.
        min_fused_fraction: Each row of a batch fuses one random contiguous span of its aligned positions, whose share
            is drawn between this and 1. 1, as in the paper: all of them.
        answer_weight: Weight of the cross-entropy of answers.
        continuation_weight: The same of texts that continue their sharer-only context.
        distillation_weight: Weight of KL(receiver that prefills the context itself || receiver with memory) per token,
            of answers and continuations; in memory mode on the receiver's grid. Costs one more forward pass of the
            receiver, over the context. 0: off.
        guard_weight: Weight of the guard loss: KL(receiver without sharers || with them) per token of mismatched rows,
            which get the sharers' inputs of another row in the batch and have no other loss. In memory mode these are
            all slots of that row; else the k-th fused position is aligned with what is aligned with that row's k-th,
            counted from the start again at its end. It trains the fuser not to change the answer for sharers with
            unrelated text. 0, as in the paper: off.
        mismatched_rate: With a guard loss, the share of mismatched rows among those with answers.
        choice_weight: Weight of the choice loss of multiple choice questions: the cross-entropy of the right answer
            among all, each scored by its mean log-likelihood per token (the length-normalized loss of arXiv
            2205.05638), one per question, added to the sum over the answer tokens before that is averaged. Needs an
            answer format that tells choices apart, such as `"text"`. 0, as in the paper: off.
        sharer_cache_dir: Folder that keeps the sharers' caches of every row, so that later epochs and runs load them
            instead of running the sharers; when all of them are there, the sharers need not be loaded
            (`load_sharers=False`). A row takes as much space as the sharer's cache of its text: 2 x layers x key/value
            heads x head_dim x tokens numbers. `None`: no cache is kept.
        sharer_cache_int8: Round the kept caches to 8 bits, see [`SharerCache.to_safetensors`].
        train_fuser: `False`: the fuser stays as it is and fusion is off, so that only the `peft_config` of
            [`C2CTrainer`] is trained: the baseline of a receiver that is tuned on the same data without any sharer.

    Defaults that differ from those of [`~transformers.TrainingArguments`]:

    | field | here | there | |
    | --- | --- | --- | --- |
    | `learning_rate` | 1e-4 | 5e-5 | the paper's |
    | `warmup_steps` | 0.1 | 0 | the paper's 10 % |
    | `weight_decay` | 0.01 | 0 | the paper's |
    | `logging_steps` | 10 | 500 | |
    | `logging_nan_inf_filter` | `False` | `True` | the trainer stops at a loss that is not finite |
    | `remove_unused_columns` | `False` | `True` | the collator picks its columns |
    | `ddp_find_unused_parameters` | `False` | `None` | every parameter of the fuser is used |
    | `ddp_broadcast_buffers` | `False` | `None` | buffers are the same everywhere |
    | `accelerator_config` | `{"dispatch_batches": False}` | `None` | streamed batches differ in width |

    Raises:
        ValueError: For an unknown value, naming the field, the value and what is allowed.
    """

    # Data
    max_length: int = field(default=2048, metadata={"help": "Largest number of tokens of an example."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    answer_format: str = field(default="letter", metadata={"help": f"One of {', '.join(ANSWER_FORMATS)}."})
    question_template: str = field(
        default=QUESTION_TEMPLATE, metadata={"help": "Prompt of a multiple choice question."}
    )
    plain_text: bool = field(default=False, metadata={"help": "Take prompts as plain text."})
    plain_choices: bool = field(default=False, metadata={"help": "The same for multiple choice only."})
    chat_template_kwargs: dict | str | None = field(default=None, metadata={"help": "Of the chat templates, JSON."})
    continuation_length: int = field(default=48, metadata={"help": "Of texts: largest number of tokens to continue."})
    min_prefix_length: int = field(default=24, metadata={"help": "Smallest number of tokens in front of them."})
    max_prefix_length: int | None = field(default=None, metadata={"help": "Largest number of them."})

    # Method
    preset: str = field(default="default", metadata={"help": f"One of {', '.join(PRESETS)}."})
    gate_noise: str | None = field(default=None, metadata={"help": f"One of {', '.join(GATE_NOISES)}."})
    min_fused_fraction: float = field(default=1.0, metadata={"help": "Smallest share of the positions that fuse."})
    answer_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy of answers."})
    continuation_weight: float = field(default=1.0, metadata={"help": "The same of continuations of a context."})
    distillation_weight: float = field(default=0.0, metadata={"help": "Weight of the KL to the prefilling receiver."})
    guard_weight: float = field(default=0.0, metadata={"help": "Weight of the guard loss."})
    mismatched_rate: float = field(default=0.25, metadata={"help": "Share of the rows that have the guard loss."})
    choice_weight: float = field(default=0.0, metadata={"help": "Weight of the choice loss."})
    sharer_cache_dir: str | None = field(default=None, metadata={"help": "Folder that keeps the sharers' caches."})
    sharer_cache_int8: bool = field(default=False, metadata={"help": "Round these caches to 8 bits."})
    train_fuser: bool = field(default=True, metadata={"help": "False: train only the receiver's adapter."})

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
        check_choice("preset", self.preset, list(PRESETS))
        if self.gate_noise is None:
            self.gate_noise = PRESETS[self.preset]
        check_choice("gate_noise", self.gate_noise, GATE_NOISES)
        super().__post_init__()
        if not 0.0 < self.min_fused_fraction <= 1.0:
            raise ValueError(f"`min_fused_fraction` must be in (0, 1], but got {self.min_fused_fraction!r}.")
        for name in _WEIGHTS:
            # Not `value < 0`, which lets NaN pass.
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"`{name}` must be at least 0, but got {getattr(self, name)!r}.")
        if not 0.0 < self.mismatched_rate <= 1.0:
            raise ValueError(
                f"`mismatched_rate` must be in (0, 1], but got {self.mismatched_rate!r}; `guard_weight=0` switches "
                "mismatched rows off."
            )
        if self.choice_weight and self.distillation_weight:
            raise ValueError("`choice_weight` and `distillation_weight` do not go together: set one of them to 0.")
        if self.choice_weight and self.label_smoothing_factor:
            raise ValueError("`choice_weight` and `label_smoothing_factor` do not go together: set one of them to 0.")
        if self.guard_weight and self.per_device_train_batch_size < 2:
            raise ValueError(
                "`guard_weight` needs other rows in the batch: `per_device_train_batch_size` must be at least 2, but "
                f"got {self.per_device_train_batch_size}."
            )
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, but got {self.max_length!r}.")
        self.chat_template_kwargs = parse_json(self.chat_template_kwargs)
        check_choice("answer_format", self.answer_format, ANSWER_FORMATS)
        for name in ("{question}", "{choices}") if self.answer_format != "text" else ("{question}",):
            if name not in self.question_template:
                raise ValueError(f"`question_template` must contain {name}, but got {self.question_template!r}.")
        check_positive(self, "dataset_num_proc", "continuation_length", "min_prefix_length", "max_prefix_length")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be False, but got True: the collator picks its columns.")

    def tokenization(self) -> dict[str, Any]:
        """Return the arguments of [`~training.dataset.prepare_dataset`]."""
        fields = {name: getattr(self, name) for name in _TOKENIZATION_FIELDS}
        return {**fields, "num_proc": self.dataset_num_proc}
