"""`CheckpointingTrainer`: complete checkpoints of the fuser, also when a run is killed, without the base models."""

from contextlib import ExitStack
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput, has_length, sort_checkpoints

from .._files import move_into_place, remove_folder, staged_folder
from ..checkpoints.fuser_weights import check_fuser_weights, load_fuser_weights
from ..checkpoints.receiver_adapter import load_adapter
from ..modeling_c2c import C2CForCausalLM

STATE_FILE = "trainer_state.json"


def restore_model(model: C2CForCausalLM, folder: str) -> None:
    """Load fuser and adapter from a checkpoint of this model.

    Raises:
        ValueError: It is one of another fuser.
    """
    weights = load_fuser_weights(folder, {})
    check_fuser_weights(weights, model.own_state_dict())
    model.load_state_dict(weights, strict=False)
    load_adapter(model.receiver, folder, {})


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints appear in the run's folder when they are complete, and hold the fuser."""

    model: C2CForCausalLM

    #: Where the checkpoint that is being written is put together, in place of the run's folder.
    _staging: Path | None = None
    _pushed_checkpoint: str | None = None

    def _get_output_dir(self, trial: object) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Write a checkpoint into a staging folder; move it to its place when every process has written its part."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with ExitStack() as stack:
            paths = [stack.enter_context(staged_folder(run_dir)) if self.is_world_process_zero() else None]
            staging = self._staging = Path(broadcast_object_list(paths)[0])
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(run_dir / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / STATE_FILE))
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()
        if staging.is_dir() and self.is_local_process_zero():
            # Another machine, which does not share the disk of the first.
            move_into_place(staging, run_dir)
        self.accelerator.wait_for_everyone()
        if self._pushed_checkpoint is not None:
            self._pushed_checkpoint = None
            super()._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save and (self.args.save_total_limit or 0) > 0:
            checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
            # As transformers' `rotate_checkpoints`, which a kill would let leave half a checkpoint.
            kept = {checkpoints[-1], self.state.best_model_checkpoint}
            num_surplus = len(checkpoints) - max(self.args.save_total_limit or 0, len(kept & {*checkpoints}))
            for checkpoint in [path for path in checkpoints if path not in kept][: max(0, num_surplus)]:
                remove_folder(checkpoint)

    def _finalize_training(self, trial: object, *args: object) -> TrainOutput:
        """Finish; where one checkpoint is kept, it is the best one, and a later one goes as a whole."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None and Path(best).is_dir():
            for checkpoint in sort_checkpoints(self._get_output_dir(trial)):
                if not Path(checkpoint).samefile(best):
                    remove_folder(checkpoint)
        return super()._finalize_training(trial, *args)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
    ) -> tuple[int, int]:
        """Return the epoch and the batch in it; transformers takes those of a stream to be `max_steps` long."""
        sizes = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        place = super()._init_training_state(*sizes, resume_from_checkpoint, trial)
        if resume_from_checkpoint is None or has_length(self.train_dataset) or self.args.ignore_data_skip:
            return place
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE_FILE))
        epoch = int(saved.epoch or 0)
        share = (saved.epoch or 0) - epoch
        return epoch, round(share * saved.max_steps * self.args.gradient_accumulation_steps)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run in the background: they wait until the checkpoint is in its place.
        self._pushed_checkpoint = checkpoint_folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        restore_model(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
