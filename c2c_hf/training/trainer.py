"""`C2CTrainer`: trains a fuser with the Trainer of transformers.

Here are the order of a step, the annealing of the gates' temperature and what is logged; the losses are in
`losses.py`, checkpoints in `checkpoints.py`.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo
from torch import nn
from transformers import DataCollator
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput, get_last_checkpoint
from transformers.utils import ModelOutput

from .._files import write_file
from ..checkpoints.receiver_adapter import add_adapter
from ..configuration_c2c import C2CConfig
from ..fusers.c2c import C2CFuser, FuserGroup
from ..hub.licenses import base_licenses
from ..hub.model_card import render_model_card
from ..hub.publish import publish_fuser
from ..hub.training_run import TrainingRun
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .arguments import PRESETS, C2CTrainingArguments
from .batch_transforms import draw_rows, keep_random_spans, mismatch_sharers
from .checkpoints import STATE_FILE, CheckpointingTrainer
from .collator import C2CDataCollator, TrainingBatch
from .dataset import prepare_dataset
from .losses import answer_losses, choice_losses, distillation_losses, guard_losses
from .run_record import Evaluated, record_run
from .sharer_cache_store import SharerCacheStore

if TYPE_CHECKING:
    from peft import PeftConfig


def _tokenized(dataset: Any, args: C2CTrainingArguments, collator: DataCollator, name: str) -> Any:
    """Tokenize the rows of a data set or of each in a dictionary; what is no data set, or of examples, is returned.

    Other collators than [`C2CDataCollator`] may take other columns: theirs stay as they are, too.
    """
    if isinstance(dataset, dict):
        return {key: _tokenized(value, args, collator, f"{name}[{key!r}]") for key, value in dataset.items()}
    if not isinstance(collator, C2CDataCollator) or not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    # Of several processes, the first one tokenizes, and the others find the result on the disk.
    with args.main_process_first(desc=f"tokenizing {name}"):
        return prepare_dataset(dataset, collator.processor, name=name, **args.tokenization())


def annealed_temperature(config: C2CConfig, step: int, max_steps: int) -> float:
    """Return the temperature of the gates in an optimizer step.

    Args:
        config: Its first and last temperature.
        step: Counted from 0.
        max_steps: Of the run.
    """
    progress = min(1.0, step / max(1, max_steps))
    ratio = config.final_gate_temperature / config.initial_gate_temperature
    return float(config.initial_gate_temperature * ratio**progress)


class C2CTrainer(CheckpointingTrainer):
    """Trains the fuser of a [`C2CForCausalLM`]; base models stay as they are.

    The temperature of the gates follows the global step, exponentially from the configuration's
    `initial_gate_temperature` to its `final_gate_temperature` over the run's real number of steps. Evaluation uses
    hard gates. Besides the loss it logs `gates_open_key` and `gates_open_value` (share of the gates that are open at
    inference), `mean_weight` (of the dynamic weights), `guard_loss` (per token, unweighted), `choice_loss` (per
    question), `gate_temperature` and `tokens_per_second` (the receiver's tokens, prompts included, of all processes).
    With distillation or continuations it logs the losses of answers and of continuations apart, per token, unweighted:
    `answer_loss`, `answer_distillation_loss`, `continuation_loss` and `continuation_distillation_loss`.

    `dataset_names`, Hub ids of the training data, go on the model card beside what the run records of itself.

    A checkpoint holds the fuser, never a base model. It appears in its place when it is complete, so that a run that
    is killed at any moment resumes from the last one, bit for bit.

    Args:
        model: The pair.
        args: Arguments of the run.
        data_collator: `None`: a [`C2CDataCollator`].
        train_dataset: Rows with `messages`, `conversations`, `question`, `choices` and `answer`, `prompt` and
            `completion`, `context`, `question` and `answers`, or `text`, which are tokenized as `args` say; or
            examples of [`~training.dataset.prepare_dataset`]. A `Dataset` or, streamed, an `IterableDataset`.
        eval_dataset: The same, or a dictionary of them; `evaluate` and `predict` take them as well.
        processing_class: The pair's processor; saved with every checkpoint.
        peft_config: A `peft.LoraConfig` or the like: an adapter of the receiver is trained with the fuser, or with
            `train_fuser=False` in its place, and saved beside it. `None`: no new adapter.
        **kwargs: Further arguments of [`~transformers.Trainer`]. `compute_metrics` gets predictions `(num_examples,
            length, vocab_size)` and labels `(num_examples, length)` of the last positions, from the one that predicts
            the first answer token on.

    Raises:
        TypeError: `model` or `args` is of another class.
        ValueError: Nothing to train: `train_fuser=False` without an adapter; or `min_fused_fraction` in memory mode.
        ValueError: `sharer_cache_dir` with `fuse_response=True`; or `distillation_weight` where `input_ids` does not
            hold the context, in fusion mode and on the sharer's grid.
        ValueError: A data set has unknown columns or a bad row.
        ValueError: The processor is not that of the model: another mode, grid, alignment or vocabulary.
        ValueError: Neither processor nor collator, or `compute_loss_func`, which is not supported.
    """

    args: C2CTrainingArguments
    model: C2CForCausalLM
    processing_class: C2CProcessor | None

    def __init__(
        self,
        model: C2CForCausalLM,
        args: C2CTrainingArguments,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: C2CProcessor | None = None,
        peft_config: "PeftConfig | None" = None,
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
        if isinstance(processing_class, C2CProcessor):
            model.check_processor(processing_class.settings)
        if peft_config is not None:
            add_adapter(model.receiver, peft_config)
        if model.config.mode == "memory" and args.min_fused_fraction != 1.0:
            raise ValueError("`min_fused_fraction` must be 1 in memory mode, where all slots of a prompt are filled.")
        on_receiver_grid = model.config.mode == "memory" and model.config.memory_grid == "receiver"
        if args.distillation_weight and not on_receiver_grid:
            raise ValueError(
                "`distillation_weight` must be 0 without `mode='memory'` and `memory_grid='receiver'`, where "
                "`input_ids` holds the tokens of the context for the receiver to prefill."
            )
        if not args.train_fuser:
            model.fuser.requires_grad_(False)
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise ValueError("`train_fuser=False` leaves nothing to train; give a `peft_config`.")
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=_tokenized(train_dataset, args, data_collator, "`train_dataset`"),
            eval_dataset=_tokenized(eval_dataset, args, data_collator, "`eval_dataset`"),
            processing_class=processing_class,
            **kwargs,
        )
        # The trainer writes its own `use_cache` into the configuration, where it has no effect.
        model.config.__dict__.pop("use_cache", None)
        folder = args.sharer_cache_dir
        self._store = None if folder is None else SharerCacheStore(folder, model, args.sharer_cache_int8)
        # Those with gates; the maps of memory mode have none.
        self._gated_fusers = [fuser for fuser in model.fuser if isinstance(fuser, C2CFuser)]
        self._groups: list[FuserGroup] = [group for fuser in self._gated_fusers for group in fuser.groups]
        for group in self._groups:
            group.gate.gate_noise = args.gate_noise or PRESETS[args.preset]
        self._processor = processing_class
        self.dataset_names: list[str] = []
        #: Prefix of the metrics' names -> the last evaluation.
        self._evaluated: dict[str, Evaluated] = {}
        #: Values of the steps since the last log, to be averaged.
        self._logged: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        #: Summed loss and number of answer tokens of the evaluation that is running.
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        #: The receiver's tokens since the last log, and its time, moved on by what is no training.
        self._num_tokens = torch.zeros((), dtype=torch.int64)
        self._last_log = 0.0

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move the model, or only the fuser where `device_map` has placed a base model."""
        placed = isinstance(model, C2CForCausalLM) and any(
            getattr(base, "hf_device_map", None) for base in (model.receiver, *model.sharers)
        )
        super()._move_model_to_device(model.fuser if placed else model, device)

    # ------------------------------------------------------------------ training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: Folder of a checkpoint; `True`: the last one in `output_dir`; `"auto"`: the same
                where there is one, else from the start.
            trial: See [`~transformers.Trainer.train`].
            ignore_keys_for_eval: See there.

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
        # `Trainer.train` would write the tokenizer's special tokens into the configurations of the base models;
        # `_inner_training_loop`, which it calls then, sets the processor again.
        self._processor, self.processing_class = self.processing_class, None
        hooks = [group.projector.weight_proj.register_forward_hook(self._record_weight) for group in self._groups]
        self._num_tokens.zero_()
        self._last_log = time.perf_counter()
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.processing_class = self._processor
            for hook in hooks:
                hook.remove()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.processing_class = self._processor
        return super()._inner_training_loop(*args, **kwargs)

    def gate_temperature(self, step: int) -> float:
        """Return the temperature of the gates in an optimizer step, counted from 0."""
        return annealed_temperature(self.model.config, step, self.state.max_steps)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Set the temperature of the gates, then run forward and backward pass."""
        temperature = self.gate_temperature(self.state.global_step)
        for fuser in self._gated_fusers:
            fuser.gate_temperature.fill_(temperature)
        num_tokens = inputs["attention_mask"].sum()
        # Summed up where the inputs are: a copy to the CPU would wait for the device in every step.
        self._num_tokens = self._num_tokens.to(num_tokens.device) + num_tokens
        return super().training_step(model, inputs, num_items_in_batch)

    def _num_own_rows(self, num_rows: int) -> int:
        """Return how many first rows of the current batch count; the rest repeats rows, to fill the last batch.

        Args:
            num_rows: Of this process's batch.
        """
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return num_rows
        return min(max(state.remainder - self.accelerator.process_index * num_rows, 0), num_rows)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count the answer tokens of a step, after the rows that other processes have are dropped."""
        if batch_samples:
            num_rows = len(batch_samples[-1]["labels"])
            num_own = self._num_own_rows(num_rows)
            if num_own < num_rows:
                # One row stays, without labels if need be: all processes take part in every step.
                last = TrainingBatch.from_inputs(batch_samples[-1]).select_rows(torch.arange(max(1, num_own)))
                if num_own == 0:
                    last.labels = torch.full_like(last.labels, -100)
                batch_samples[-1] = {name: value for name, value in vars(last).items() if value is not None}
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss_context_manager(self) -> ExitStack:
        """Switch autocast on where it is asked for, and fusion off with `train_fuser=False`."""
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())
        if not self.args.train_fuser:
            stack.enter_context(self.model.disable_fusion())
        return stack

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """Return the mean loss of the answer tokens, in training with the other losses of `losses.py`.

        In training there are up to three kinds of rows, answers, continuations and mismatched rows; each weighs by its
        number of rows, and is a mean over its tokens.

        Args:
            model: The pair, as distributed training wraps it.
            inputs: The output of [`C2CDataCollator`].
            return_outputs: Return the model's outputs as well.
            num_items_in_batch: Number of answer tokens of all processes and accumulated batches. `None`: those of
                this batch.

        Raises:
            ValueError: In training, a loss that is not finite; the message shows the text of the row.
        """
        batch, args, training = TrainingBatch.from_inputs(inputs), self.args, self.model.training
        if self._store is not None and self.model.fusion_enabled:
            batch.sharer_caches = self._store.load(batch.sharer_input_ids, batch.sharer_attention_mask)
        if training and args.min_fused_fraction < 1.0:
            batch.sharer_alignment = keep_random_spans(batch.sharer_alignment, args.min_fused_fraction)

        num_tokens, num_rows = batch.num_targets().sum(), len(batch.labels)
        if training and self.accelerator.num_processes > 1 and int(num_tokens) == 0:
            # Other processes have the last rows; this one takes part in their backward pass with gradients of 0.
            outputs = model(**batch.model_inputs(with_labels=False))
            loss = 0.0 * sum(parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad)
            return (loss, outputs) if return_outputs else loss
        mismatched = None
        if training and args.guard_weight and num_rows > 1:
            drawn = draw_rows(self._is_answer(batch), args.mismatched_rate)
            if bool(drawn.any()):
                rows = drawn.nonzero().flatten()
                mismatched = mismatch_sharers(batch, rows, self.model.config.mode == "memory")
                batch = batch.select_rows((~drawn).nonzero().flatten())

        outputs = choice = None
        if training and args.choice_weight and batch.wrong_answer_ids is not None and not return_outputs:
            losses, choice = choice_losses(self.model, model, batch)
        else:
            # The model's own loss is a mean. With `fuse_response` the labels say where the answers start.
            labelled, fuses = self.model.config.fuse_response, self.model.fusion_enabled
            outputs = model(**batch.model_inputs(with_labels=labelled, fuses=fuses))
            losses = answer_losses(batch.labels, outputs.logits, args.label_smoothing_factor if training else 0.0)
        if training:
            self._check_finite(batch, losses)

        total = losses.sum()
        if training:
            distillation = None
            if args.distillation_weight and outputs is not None:
                distillation = distillation_losses(self.model, batch, outputs.logits)
            # Times the number of tokens, by which all is divided below.
            total = self._weighted_loss(batch, losses, distillation) * num_tokens / num_rows
        if choice is not None:
            total = total + args.choice_weight * choice.sum()
            self._logged["choice_loss"].append(choice.detach().mean())
        if mismatched is not None:
            guard = guard_losses(self.model, mismatched).mean()
            total = total + args.guard_weight * guard * len(mismatched.labels) * num_tokens / num_rows
            self._logged["guard_loss"].append(guard.detach())
        if not training:
            num_own = self._num_own_rows(num_rows)
            own = [losses[:num_own].sum().detach().double(), batch.num_targets()[:num_own].sum().double()]
            self._eval_sums += torch.stack([value.cpu() for value in own])

        loss = total / (num_tokens if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and args.average_tokens_across_devices:
            # The number is that of all processes, whose gradients are averaged.
            loss = loss * self.accelerator.num_processes
        if training and any(bool((alignment < 0).all()) for alignment in batch.sharer_alignment):
            # Distributed training waits for a gradient of every fuser: 0 for one that fuses no position.
            loss = loss + 0.0 * sum(parameter.sum() for parameter in self.model.fuser.parameters())
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def _is_answer(batch: TrainingBatch) -> torch.Tensor:
        """Return which rows do not continue their context, `(batch_size,)`."""
        if batch.is_continuation is None:
            return torch.ones(len(batch.labels), dtype=torch.bool, device=batch.labels.device)
        return ~batch.is_continuation

    def _weighted_loss(
        self, batch: TrainingBatch, losses: torch.Tensor, distillation: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the sum over answers and continuations: each one's number of rows times its mean over its tokens.

        Args:
            batch: Without mismatched rows.
            losses: `(batch_size, length)`, the cross-entropy of each token.
            distillation: `(num_targets,)`, row by row, or `None`.
        """
        args, counts, is_answer = self.args, batch.num_targets(), self._is_answer(batch)
        total = losses.new_zeros(())
        for kind, weight, rows in (
            ("answer", args.answer_weight, is_answer),
            ("continuation", args.continuation_weight, ~is_answer),
        ):
            if not bool(rows.any()):
                continue
            loss = losses[rows.to(losses.device)].sum() / counts[rows].sum().to(losses.device)
            kind_loss = weight * loss
            if distillation is not None:
                of_kind = rows.repeat_interleave(counts).to(distillation.device)
                divergence = distillation[of_kind].mean()
                kind_loss = kind_loss + args.distillation_weight * divergence
                self._logged[f"{kind}_distillation_loss"].append(divergence.detach())
            if distillation is not None or batch.is_continuation is not None:
                self._logged[f"{kind}_loss"].append(loss.detach())
            total = total + kind_loss * rows.sum().to(losses.device)
        return total

    def _check_finite(self, batch: TrainingBatch, losses: torch.Tensor) -> None:
        """Raise `ValueError` where a loss is not finite."""
        if bool(torch.isfinite(losses.detach().sum())):
            return
        row = int((~torch.isfinite(losses)).any(1).nonzero()[0])
        ids = batch.input_ids[row][batch.attention_mask[row].bool()]
        text = f"tokens {ids[:16].tolist()}"
        if isinstance(self.processing_class, C2CProcessor):
            text = repr(self.processing_class.tokenizer.decode(ids)[:80])
        loss = float(losses[row].detach().sum())
        raise ValueError(
            f"The loss of step {self.state.global_step + 1} is not finite ({loss}) in row {row + 1} of the batch, "
            f"which starts with {text}; training stops, and the checkpoints in {self.args.output_dir!r} stay as they "
            "are. Look at that row, or lower `learning_rate`."
        )

    # ------------------------------------------------------------------ evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Evaluate a batch; labels are cut to the last positions, whose logits the model returns."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if isinstance(logits, torch.Tensor) and labels is not None:
            labels = labels[:, labels.shape[1] - logits.shape[1] :]
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; the loss is the mean over all answer tokens, however they are batched."""
        self._eval_sums.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.reduce(self._eval_sums.to(self.args.device), "sum")
        for name in [name for name in output.metrics if name.endswith("_loss")]:
            output.metrics[name] = float(sums[0] / sums[1].clamp_min(1))
        step, num_items = self.state.global_step, output.num_samples or 0
        self._evaluated[metric_key_prefix] = Evaluated(step, num_items, dict(output.metrics))
        return output

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # They were those of another step.
        self._evaluated.clear()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with hard gates.

        Args:
            eval_dataset: Rows or examples, or a dictionary of them. `None`: the trainer's; a text: one of those.
            *args: See [`~transformers.Trainer.evaluate`].
            **kwargs: See there.

        Raises:
            ValueError: The data set has unknown columns or a bad row.
        """
        with self._not_timed():
            eval_dataset = _tokenized(eval_dataset, self.args, self.data_collator, "`eval_dataset`")
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict with hard gates.

        Args:
            test_dataset: Rows or examples.
            *args: See [`~transformers.Trainer.predict`].
            **kwargs: See there.

        Returns:
            Predictions, labels and metrics as `compute_metrics` gets them.

        Raises:
            ValueError: The data set has unknown columns or a bad row.
        """
        test_dataset = _tokenized(test_dataset, self.args, self.data_collator, "`test_dataset`")
        return super().predict(test_dataset, *args, **kwargs)

    # ------------------------------------------------------------------ logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with a training loss also the state of the fuser."""
        if "loss" in logs:
            if self._gated_fusers:
                logs.update(self.gates_open())
                logs["gate_temperature"] = float(self._gated_fusers[0].gate_temperature)
            logs.update((name, float(torch.stack(values).mean())) for name, values in self._logged.items())
            self._logged.clear()
            now = time.perf_counter()
            num_tokens = float(self.accelerator.gather(self._num_tokens.to(self.args.device)).sum())
            logs["tokens_per_second"] = round(num_tokens / (now - self._last_log), 1)
            self._num_tokens.zero_()
            self._last_log = now
        super().log(logs, start_time)

    def gates_open(self) -> dict[str, float]:
        """Return the share of gates that are open at inference, of keys and of values."""
        gates: dict[str, list[bool]] = {"gates_open_key": [], "gates_open_value": []}
        for fuser in self._gated_fusers:
            for group in fuser.groups:
                for entry, is_open in zip(group.entries, (group.gate.gate_logit > 0).tolist(), strict=True):
                    gates["gates_open_key" if entry < fuser.num_layers else "gates_open_value"].append(is_open)
        return {name: sum(values) / len(values) for name, values in gates.items()}

    def _record_weight(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self.model.training:
            self._logged["mean_weight"].append(output.detach().float().sigmoid().mean())

    # ------------------------------------------------------------------ saving and publishing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save fuser and processor, and what the model card says about the run (`training_run.json`).

        Args:
            output_dir: The folder. `None`: the run's.
            _internal_call: See [`~transformers.Trainer.save_model`].
        """
        if self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self._record().save(folder)
        super().save_model(output_dir, _internal_call)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Save the fuser and publish it with a model card of the run, never a base model's weight or a checkpoint.

        Args:
            commit_message: Of the commit.
            blocking: Has no effect: the upload is awaited.
            token: Of the Hub. `None`: that of the arguments.
            revision: The branch. `None`: that of the arguments.
            private: Whether a new repository is private. `None`: as the arguments say.
            **kwargs: `license`, `datasets`, `evaluation`, `tags`, `receiver`, `sharers` and the others of
                [`~hub.publish.publish_fuser`].

        Returns:
            The commit; `None` on other processes than the first.

        Raises:
            ValueError: A base model is a local folder, or the license cannot be determined.
            OSError: The Hub refuses.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        args, tags = self.args, kwargs.pop("tags", None) or []
        # Trackers name their page by a tag of the model.
        tags = [tags] if isinstance(tags, str) else [*(self.model.model_tags or []), *tags]
        return publish_fuser(
            args.output_dir,
            args.hub_model_id or Path(args.output_dir).absolute().name,
            tags=tags,
            token=args.hub_token if token is None else token,
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision if revision is None else revision,
            commit_message=commit_message,
            **kwargs,
        )

    def create_model_card(
        self, license: str | None = None, tags: Sequence[str] | str = (), model_name: str | None = None, **kwargs: Any
    ) -> None:
        """Write the model card of the run, `README.md` in its folder, which publishing takes as it is then.

        Args:
            license: Of the fuser. `None`: what follows from the base models' cards.
            tags: Further tags.
            model_name: `name` or `owner/name` on the Hub. `None`: that of the arguments.
            **kwargs: `datasets` and `evaluation`, see [`~hub.publish.publish_fuser`].

        Raises:
            ValueError: The license cannot be determined.
        """
        if not self.is_world_process_zero():
            return
        folder, config = Path(self.args.output_dir), self.model.config
        card = render_model_card(
            config,
            self.model.own_state_dict(),
            base_licenses(config, self.args.hub_token),
            model_name or self.args.hub_model_id or folder.absolute().name,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags,
            run=self._record(),
            **kwargs,
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "README.md", str(card))

    def _record(self) -> TrainingRun:
        return record_run(self.args, self.state, self.train_dataset, self._evaluated, self.dataset_names)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        with self._not_timed():
            super()._save_checkpoint(model, trial)

    @contextmanager
    def _not_timed(self) -> Iterator[None]:
        """Leave the time of this context out of `tokens_per_second`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last_log += time.perf_counter() - start
