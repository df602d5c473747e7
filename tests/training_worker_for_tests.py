"""Training runs in processes of their own: `distributed OUTPUT_DIR BATCH_SIZE` or `killed OUTPUT_DIR`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from training_for_tests import logged_losses, make_model, make_trainer


def _distributed(output_dir: str, batch_size: str) -> None:
    trainer = make_trainer(
        output_dir,
        make_model(2, fuser_dropout=0.0),
        max_steps=5,
        per_device_train_batch_size=int(batch_size),
        gate_noise="none",
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
    )
    examples = [dict(example) for example in trainer.train_dataset]
    for example in examples[:5]:
        example["sharer_alignment"] = [example["sharer_alignment"][0], [-1] * len(example["input_ids"])]
    trainer.train_dataset = examples
    trainer.train()
    if trainer.is_world_process_zero():
        (Path(output_dir) / "losses.json").write_text(json.dumps(logged_losses(trainer)))


def _killed(output_dir: str) -> None:
    trainer = make_trainer(output_dir, max_steps=6, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    save = trainer._save_optimizer_and_scheduler

    def save_or_die(folder: str) -> None:
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save(folder)

    trainer._save_optimizer_and_scheduler = save_or_die
    trainer.train()


if __name__ == "__main__":
    # The killed run computes as the test does that compares with it, with as many threads.
    if sys.argv[1] == "distributed":
        torch.set_num_threads(1)
    {"distributed": _distributed, "killed": _killed}[sys.argv[1]](*sys.argv[2:])
