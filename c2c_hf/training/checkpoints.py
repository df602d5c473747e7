"""Checkpoints of a fuser that a killed run never leaves half written."""

import shutil
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..checkpoints.fuser_weights import check_fuser_weights, load_fuser_weights
from ..checkpoints.receiver_adapter import load_adapter

STATE_FILE = "trainer_state.json"
_STAGING_FOLDER = ".incomplete"


class CheckpointingTrainer(Trainer):
    """Writes checkpoints beside their place, moves them there when complete, and reads the fuser back from them."""

    #: Whether a checkpoint is being written, and then beside its place.
    _staging = False
    _hub_checkpoint: str | None = None
    #: Since when time counts as training; the time that a checkpoint takes does not.
    _clock = 0.0

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / _STAGING_FOLDER) if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and move it there when every process has written its part."""
        start = time.perf_counter()
        run_dir = Path(self._get_output_dir(trial))
        staging = run_dir / _STAGING_FOLDER
        name = f"checkpoint-{self.state.global_step}"
        if self.is_local_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(run_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / STATE_FILE))
        self.accelerator.wait_for_everyone()
        # On a shared disk there is nothing left for the second; elsewhere each machine moves its own part.
        if self.is_world_process_zero():
            _move_into_place(staging, name, run_dir)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero():
            _move_into_place(staging, name, run_dir)
        self.accelerator.wait_for_everyone()
        if self._hub_checkpoint is not None:
            self._hub_checkpoint = None
            super()._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self._clock += time.perf_counter() - start

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads run in the background, so they wait until the checkpoint is where it stays.
        self._hub_checkpoint = checkpoint_folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_fuser_weights(resume_from_checkpoint, {})
        check_fuser_weights(weights, self.model._own_state_dict())
        self.model.load_state_dict(weights, strict=False)
        load_adapter(self.model.receiver, resume_from_checkpoint, {})

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _move_into_place(staging: Path, name: str, run_dir: Path) -> None:
    if not (staging / name).is_dir():
        return
    if (run_dir / name).exists():
        (run_dir / name).rename(staging / f"old-{name}")
    (staging / name).rename(run_dir / name)
    shutil.rmtree(staging, ignore_errors=True)
