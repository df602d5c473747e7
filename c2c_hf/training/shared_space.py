"""Several receivers that share a latent space (`fuser_type="c2c_shared"`): trained in one run, joined by others."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..checkpoints.base_models import BaseModel
from ..fusers.c2c_shared import C2CSharedFuser, LatentEncoder
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .arguments import PRESETS, C2CTrainingArguments
from .checkpoints import CheckpointingTrainer, restore_model
from .collator import C2CDataCollator, TrainingBatch
from .losses import answer_losses
from .trainer import annealed_temperature


def shared_fusers(model: C2CForCausalLM) -> list[C2CSharedFuser]:
    """Return the fusers of a model with `fuser_type="c2c_shared"`.

    Raises:
        ValueError: It has others.
    """
    fusers = [fuser for fuser in model.fuser if isinstance(fuser, C2CSharedFuser)]
    if len(fusers) < len(model.fuser):
        raise ValueError(
            f"`model` must have `fuser_type='c2c_shared'`, but has {model.config.fuser_type!r} with "
            f"`mode={model.config.mode!r}`."
        )
    return fusers


def share_encoders(models: Sequence[C2CForCausalLM]) -> None:
    """Let models that have a sharer in common use one encoder of it, the one of the first.

    Args:
        models: One per receiver, with equal latent spaces.

    Raises:
        ValueError: Another `fuser_type`, or encoders of one sharer that differ in shape.
    """
    encoders: dict[object, LatentEncoder] = {}
    for model in models:
        for fuser, sharer, config in zip(shared_fusers(model), model.sharers, model.config.sharers, strict=True):
            first = encoders.setdefault(config.fingerprint or id(sharer), fuser.encoder)
            shapes, expected = (
                {name: value.shape for name, value in encoder.state_dict().items()}
                for encoder in (fuser.encoder, first)
            )
            if shapes != expected:
                raise ValueError(
                    f"`models`: the encoders of {config.name_or_path or 'a sharer'} differ in shape; give all models "
                    "the same `shared_hidden_size`, `shared_num_layers`, `joint_keys_values` and fuser sizes."
                )
            fuser.encoder = first


def add_sharer(
    model: C2CForCausalLM,
    sharer: BaseModel,
    token_alignment: str | None = None,
    sharer_kwargs: dict[str, Any] | None = None,
) -> C2CForCausalLM:
    """Return a model with one more sharer, of which alone encoder and gates can be trained.

    Args:
        model: With `fuser_type="c2c_shared"`. Its fusers, now frozen, are those of the returned model, too.
        sharer: Hub id, folder or loaded model.
        token_alignment: See [`SharerConfig`]. `None`: by the vocabularies.
        sharer_kwargs: Arguments of the sharer's own `from_pretrained`.

    Returns:
        The new model, whose new gates are closed.

    Raises:
        ValueError: Another `fuser_type`, or a sharer that does not go with the receiver.
    """
    old, first = shared_fusers(model), model.config.sharers[0]
    sizes = {
        name: getattr(first, name)
        for name in ("fuser_hidden_size", "fuser_intermediate_size", "num_fuser_layers", "fuser_dropout")
    }
    alone = C2CForCausalLM.from_receiver_and_sharers(
        model.receiver, sharer, sharer_kwargs=sharer_kwargs, token_alignment=token_alignment, **sizes
    )
    config = copy.deepcopy(model.config)
    config.sharers.append(alone.config.sharers[0])
    config.check()
    grown = C2CForCausalLM(config, model.receiver, [*model.sharers, *alone.sharers])
    model.fuser.requires_grad_(False)
    for index, fuser in enumerate(old):
        grown.fuser[index] = fuser
    joining = shared_fusers(grown)[-1]
    joining.share_projectors(old[0])
    joining.to(next(old[0].parameters()).device)
    with torch.no_grad():
        for group in joining.groups:
            group.gate.gate_logit.zero_()
    for index, table in enumerate([*model.token_tables, *alone.token_tables]):
        if table is not None:
            getattr(grown, f"token_table_{index}").copy_(table)
    return grown.train(model.training)


class SharedSpace(nn.Module):
    """Models of several receivers, whose fusers share a latent space, as one module to train.

    Args:
        models: One per receiver; sharers that they have in common get one encoder, see [`share_encoders`].
    """

    def __init__(self, models: Sequence[C2CForCausalLM]) -> None:
        super().__init__()
        share_encoders(models)
        self.models: Sequence[C2CForCausalLM] = nn.ModuleList(models)  # type: ignore[assignment]

    def forward(self, batches: dict[str, dict[str, Any]]) -> torch.Tensor:
        """Return each model's mean loss of its answer tokens, `(num_models,)`.

        Args:
            batches: Per index of a model the output of its collator.
        """
        losses = []
        for index, model in enumerate(self.models):
            batch = TrainingBatch.from_inputs(batches[str(index)])
            outputs = model(**batch.model_inputs(with_labels=model.config.fuse_response))
            tokens = answer_losses(batch.labels, outputs.logits, 0.0)
            losses.append(tokens.sum() / batch.num_targets().sum().to(tokens.device))
        return torch.stack([loss.to(losses[0].device) for loss in losses])


class _RowsOfAll(torch.utils.data.Dataset):
    """Row i of every data set; shorter ones start again."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return max(map(len, self.datasets))

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [dataset[index % len(dataset)] for dataset in self.datasets]


class _CollatorOfAll:
    """The batch of every model, under its index."""

    def __init__(self, collators: Sequence[C2CDataCollator]) -> None:
        self.collators = collators

    def __call__(self, rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        return {str(i): collator([row[i] for row in rows]) for i, collator in enumerate(self.collators)}


class SharedSpaceTrainer(CheckpointingTrainer):
    """Trains several receivers' models in one run; the loss is the sum of their mean losses of answer tokens.

    Gates are annealed as in [`C2CTrainer`]. Each model with its processor is saved in a folder of its own, named by
    its index, where `C2CForCausalLM.from_pretrained` finds it. Frozen fusers stay as they are.

    Args:
        models: One per receiver, with `fuser_type="c2c_shared"` and equal latent spaces. Encoders of common sharers
            become one.
        args: Arguments of the run. Of the losses only that of answers, with weight 1, is used.
        train_datasets: Examples of [`~training.dataset.prepare_dataset`], one data set per model.
        processors: One per model.

    Raises:
        ValueError: Their numbers differ, a processor is not its model's, or a loss is asked for that is not used.
    """

    args: C2CTrainingArguments

    def __init__(
        self,
        models: Sequence[C2CForCausalLM],
        args: C2CTrainingArguments,
        train_datasets: Sequence[Dataset],
        processors: Sequence[C2CProcessor],
        **kwargs: Any,
    ) -> None:
        if not len(models) == len(train_datasets) == len(processors):
            raise ValueError(
                f"`train_datasets` and `processors` must be as many as `models` ({len(models)}), but got "
                f"{len(train_datasets)} and {len(processors)}."
            )
        for name in ("distillation_weight", "guard_weight", "choice_weight", "sharer_cache_dir"):
            if getattr(args, name):
                raise ValueError(f"`{name}` is not supported by `SharedSpaceTrainer`.")
        for model, processor in zip(models, processors, strict=True):
            model.check_processor(processor.settings)
        self.models, self.processors = list(models), list(processors)
        self._groups = [group for model in models for fuser in shared_fusers(model) for group in fuser.groups]
        for group in self._groups:
            group.gate.gate_noise = args.gate_noise or PRESETS[args.preset]
        super().__init__(
            model=SharedSpace(models),
            args=args,
            data_collator=_CollatorOfAll([C2CDataCollator(processor) for processor in processors]),
            train_dataset=_RowsOfAll(train_datasets),
            **kwargs,
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Set the temperature of the gates, then run forward and backward pass."""
        for model in self.models:
            temperature = annealed_temperature(model.config, self.state.global_step, self.state.max_steps)
            for fuser in shared_fusers(model):
                fuser.gate_temperature.fill_(temperature)
        return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sum of the models' losses.

        Raises:
            ValueError: A loss that is not finite.
        """
        losses = model(inputs)
        if not bool(torch.isfinite(losses.detach()).all()):
            raise ValueError(f"The losses of step {self.state.global_step + 1} are not finite: {losses.tolist()}.")
        return (losses.sum(), {"losses": losses}) if return_outputs else losses.sum()

    def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        for index, (model, processor) in enumerate(zip(self.models, self.processors, strict=True)):
            model.save_pretrained(folder / str(index))
            processor.save_pretrained(folder / str(index))
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for index, own in enumerate(self.models):
            restore_model(own, str(Path(resume_from_checkpoint) / str(index)))
