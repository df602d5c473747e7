"""`C2CTrainer`: trains a fuser with the Trainer of transformers."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoints.receiver_adapter import add_adapter
from ..fusers.c2c import C2CFuser, FuserGroup
from ..inference.output_head import contiguous_head
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .arguments import C2CTrainingArguments
from .checkpoints import STATE_FILE, CheckpointingTrainer
from .collator import C2CDataCollator, as_list, random_spans
from .losses import choice_losses, guard_loss, shifted
from .sharer_cache_store import SharerStore


class C2CTrainer(CheckpointingTrainer):
    """Trains the fuser of a [`C2CForCausalLM`]; base models stay as they are.

    The temperature of the gates follows the global step, exponentially from the configuration's
    `initial_gate_temperature` to its `final_gate_temperature` over the run's real number of steps. Evaluation uses
    hard gates. Besides the loss it logs `gates_open_key` and `gates_open_value` (share of the gates that are open at
    inference), `mean_weight` (of the dynamic weights), `guard_loss` (per token, unweighted),
    `choice_loss` (per question), `gate_temperature` and
    `tokens_per_second` (the receiver's tokens, prompts included, of all processes).

    A checkpoint holds the fuser, never a base model. It is written beside its place and moved there when complete, so
    that a run killed at any moment resumes from the last one, bit for bit.

    Args:
        model: The pair.
        args: The run.
        data_collator: `None`: a [`C2CDataCollator`].
        train_dataset: Examples of [`~training_data.prepare_dataset`].
        eval_dataset: The same, or a dictionary of them.
        processing_class: The pair's processor; saved with every checkpoint.
        peft_config: A `peft.LoraConfig` or the like: an adapter of the receiver is trained with the fuser, or with
            `train_fuser=False` in its place, and saved beside it. `None`: no new adapter.
        **kwargs: Further arguments of [`~transformers.Trainer`].

    Raises:
        TypeError: The model is none of ours.
        ValueError: Nothing to train: `train_fuser=False` without an adapter; or `min_fused_fraction` in memory mode.
        ValueError: `sharer_cache_dir` with `fuse_response=True`.
        ValueError: Neither processor nor collator, or `compute_loss_func`, which has no place here.
    """

    args: C2CTrainingArguments
    processing_class: Any

    def __init__(
        self,
        model: C2CForCausalLM,
        args: C2CTrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: C2CProcessor | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, C2CForCausalLM):
            raise TypeError(f"`model` must be a C2CForCausalLM, but got {type(model).__name__}.")
        if not isinstance(args, C2CTrainingArguments):
            raise TypeError(f"`args` must be C2CTrainingArguments, but got {type(args).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` is not supported: override `compute_loss`.")
        if data_collator is None:
            if processing_class is None:
                raise ValueError("Either `processing_class` or `data_collator` must be given, but got neither.")
            data_collator = C2CDataCollator(processing_class)
        if peft_config is not None:
            add_adapter(model.receiver, peft_config)
        if model.config.mode == "memory" and args.min_fused_fraction != 1.0:
            raise ValueError("`min_fused_fraction` must be 1 in memory mode, where all slots of a prompt are filled.")
        if not args.train_fuser:
            model.fuser.requires_grad_(False)
            model.fusion_enabled = False
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise ValueError("`train_fuser=False` leaves nothing to train; give a `peft_config`.")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # The trainer writes its own `use_cache` into the configuration, where nothing reads it.
        model.config.__dict__.pop("use_cache", None)
        folder = args.sharer_cache_dir
        self._store = None if folder is None else SharerStore(folder, model, args.sharer_cache_int8)
        # Those with gates; the maps of memory mode have none.
        self._fusers = [fuser for fuser in model.fuser if isinstance(fuser, C2CFuser)]
        self._groups: list[FuserGroup] = [group for fuser in self._fusers for group in fuser.groups]
        for group in self._groups:
            group.gate.gate_noise = str(args.gate_noise)
        self._processor: Any = processing_class
        self._weights: list[torch.Tensor] = []
        self._guards: list[torch.Tensor] = []
        self._choices: list[torch.Tensor] = []
        #: Summed loss and number of answer tokens of the evaluation at work.
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        self._tokens = 0
        self._clock = 0.0

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move the model, or the fuser alone where `device_map` has placed a base model."""
        placed = isinstance(model, C2CForCausalLM) and any(
            getattr(base, "hf_device_map", None) for base in (model.receiver, *model.sharers)
        )
        super()._move_model_to_device(model.fuser if placed else model, device)

    # ------------------------------------------------------------------ the loss

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train.

        Args:
            resume_from_checkpoint: Folder of a checkpoint; `True`: the last one in `output_dir`; `"auto"`: the same
                where there is one, else from the start.
            trial: See [`~transformers.Trainer.train`].
            ignore_keys_for_eval: Likewise.

        Raises:
            ValueError: No complete checkpoint there, one of another fuser, or a loss that is not finite.
        """
        if resume_from_checkpoint == "auto":
            output_dir = Path(self.args.output_dir)
            resume_from_checkpoint = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
        if resume_from_checkpoint in ("true", "True"):  # from a command line
            resume_from_checkpoint = True
        if isinstance(resume_from_checkpoint, str) and not (Path(resume_from_checkpoint) / STATE_FILE).is_file():
            raise ValueError(
                f"`resume_from_checkpoint`: {resume_from_checkpoint!r} is no complete checkpoint, since it has no "
                f"{STATE_FILE}; name a folder `checkpoint-<step>`, or `True` for the last one."
            )
        # The trainer would write the tokenizer's special tokens into the configurations of the base models.
        self._processor, self.processing_class = self.processing_class, None
        hooks = [group.projector.weight_proj.register_forward_hook(self._record_weight) for group in self._groups]
        self._tokens, self._clock = 0, time.perf_counter()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.processing_class = self._processor
            for hook in hooks:
                hook.remove()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.processing_class = self._processor
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Set the temperature of the gates and take one step forward and backward."""
        temperature = self.gate_temperature(self.state.global_step)
        for fuser in self._fusers:
            fuser.gate_temperature.fill_(temperature)
        self._tokens += inputs["attention_mask"].sum()
        return super().training_step(model, inputs, num_items_in_batch)

    def gate_temperature(self, step: int) -> float:
        """Return the temperature of an optimizer step, counted from 0."""
        config = self.model.config
        progress = min(1.0, step / max(1, self.state.max_steps))
        ratio = config.final_gate_temperature / config.initial_gate_temperature
        return float(config.initial_gate_temperature * ratio**progress)

    def compute_loss_context_manager(self) -> ExitStack:
        """Hold autocast, where it is on, and a head that is fast on a processor."""
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        stack.enter_context(contiguous_head(self.model.receiver))
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the mean loss of the answer tokens, in training with the guard loss added.

        Raises:
            ValueError: In training, a loss that is not finite; the message shows the text of the row.
        """
        inputs, labels = dict(inputs), inputs["labels"]
        if self._store is not None and self.model.fusion_enabled:
            inputs["sharer_caches"] = self._store.states(inputs)
        wrong, wrong_rows = inputs.pop("wrong_answer_ids", None), inputs.pop("wrong_answer_rows", None)
        training = self.model.training
        if training and self.args.min_fused_fraction < 1.0:  # type: ignore[operator]
            inputs["sharer_alignment"] = random_spans(
                inputs["sharer_alignment"], float(self.args.min_fused_fraction or 1)
            )
        # The loss is ours, so that rows and tokens are known; response fusion asks the labels where answers start.
        asked = {"use_cache": False, "labels": labels if self.model.config.fuse_response else None}
        choice = None
        if training and self.args.choice_weight and wrong is not None and not return_outputs:
            outputs, (losses, choice) = None, choice_losses(self.model, model, inputs, wrong, wrong_rows)
        else:
            outputs = model(**{**inputs, **asked})
            targets, logits = shifted(labels, outputs.logits)
            smoothing = self.args.label_smoothing_factor if training else 0.0
            losses = nn.functional.cross_entropy(
                logits.transpose(1, 2), targets, ignore_index=-100, reduction="none", label_smoothing=smoothing
            )
        if training and not bool(torch.isfinite(losses.detach().sum())):
            self._stop(inputs, losses)
        total, answer_tokens = losses.sum(), (labels[:, 1:] != -100).sum()
        if choice is not None:
            total = total + float(self.args.choice_weight or 0) * choice.sum()
            self._choices.append(choice.detach().mean())
        if training and self.args.guard_weight and len(labels) > 1:
            guard = guard_loss(self.model, inputs, asked, labels)
            total = total + self.args.guard_weight * guard
            self._guards.append(guard.detach() / answer_tokens)
        if not training:
            self._evaluated += torch.stack([total.detach().double(), answer_tokens.double()]).cpu()
        count = answer_tokens if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The count is that of all processes, whose gradients are averaged.
            loss = loss * self.accelerator.num_processes
        if training and any(bool((read < 0).all()) for read in as_list(inputs["sharer_alignment"])):
            # A sharer that no row reads takes part with gradient 0, which distributed training waits for.
            loss = loss + 0.0 * sum(p.sum() for p in self.model.fuser.parameters())
        return (loss, outputs) if return_outputs else loss

    def _stop(self, inputs: dict[str, Any], losses: torch.Tensor) -> NoReturn:
        row = int((~torch.isfinite(losses)).any(1).nonzero()[0])
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        text = f"tokens {ids[:16].tolist()}"
        if isinstance(self.processing_class, C2CProcessor):
            text = repr(self.processing_class.tokenizer.decode(ids)[:80])
        loss = float(losses[row].detach().sum())
        raise ValueError(
            f"The loss of step {self.state.global_step + 1} is not finite ({loss}) in row {row + 1} of the batch, "
            f"which starts with {text}; training stops, and the checkpoints in {self.args.output_dir!r} stay as they "
            "are. Look at that row, or lower `learning_rate`."
        )

    # ------------------------------------------------------------------ what is logged

    def _record_weight(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.model.training:
            self._weights.append(output.detach().float().sigmoid().mean())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and beside a training loss what the fuser does."""
        if "loss" in logs:
            if self._fusers:
                logs.update(self.gates_open())
            for name, values in (
                ("mean_weight", self._weights),
                ("guard_loss", self._guards),
                ("choice_loss", self._choices),
            ):
                if values:
                    logs[name] = float(torch.stack(values).mean())
                    values.clear()
            if self._fusers:
                logs["gate_temperature"] = float(self._fusers[0].gate_temperature)
            now = time.perf_counter()
            tokens = torch.as_tensor(self._tokens, device=self.args.device)
            logs["tokens_per_second"] = round(float(self.accelerator.gather(tokens).sum()) / (now - self._clock), 1)
            self._tokens, self._clock = 0, now
        super().log(logs, start_time)

    def gates_open(self) -> dict[str, float]:
        """Return the share of gates that are open at inference, of keys and of values."""
        gates: dict[str, list[bool]] = {"gates_open_key": [], "gates_open_value": []}
        for fuser in self._fusers:
            for group in fuser.groups:
                for entry, is_open in zip(group.entries, (group.gate.gate_logit > 0).tolist(), strict=True):
                    gates["gates_open_key" if entry < fuser.num_layers else "gates_open_value"].append(is_open)
        return {name: sum(values) / len(values) for name, values in gates.items()}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the loss is the mean over all answer tokens, whatever the batches."""
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        sums = self.accelerator.reduce(self._evaluated.to(self.args.device), "sum")
        for name in [name for name in output.metrics if name.endswith("_loss")]:
            output.metrics[name] = float(sums[0] / sums[1].clamp_min(1))
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with hard gates; the time it takes does not count as training."""
        start = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._clock += time.perf_counter() - start
