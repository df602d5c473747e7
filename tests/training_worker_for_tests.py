"""Training runs in processes of their own: `distributed OUTPUT_DIR BATCH_SIZE [...]` or `killed OUTPUT_DIR`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from training_for_tests import logged_losses, make_model, make_trainer

from c2c_hf import C2CTrainer
from c2c_hf.training.sharer_cache_store import SharerCacheStore


def distributed_trainer(output_dir: str | Path, batch_size: int) -> C2CTrainer:
    """Not every row aligns the second sharer."""
    trainer = make_trainer(
        output_dir,
        make_model(2, fuser_dropout=0.0),
        max_steps=5,
        per_device_train_batch_size=batch_size,
        gate_noise="none",
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
    )
    examples = [dict(example) for example in trainer.train_dataset]
    for example in examples[:5]:
        example["sharer_alignment"] = [example["sharer_alignment"][0], [-1] * len(example["input_ids"])]
    trainer.train_dataset = examples
    return trainer


def _uneven(output_dir: Path, batch_size: int) -> C2CTrainer:
    """Seven rows for steps of four, in accumulated batches of two, and five for the evaluation."""
    trainer = make_trainer(
        output_dir / "uneven",
        make_model(fuser_dropout=0.0),
        num_train_epochs=2,
        per_device_train_batch_size=batch_size // 2,
        per_device_eval_batch_size=batch_size // 2,
        gradient_accumulation_steps=2,
        gate_noise="none",
        learning_rate=1e-2,
        sharer_cache_dir=str(output_dir / "sharer-caches"),
    )
    examples = [dict(example) for example in trainer.train_dataset]
    trainer.train_dataset, trainer.eval_dataset = examples[:7], examples[3:]
    return trainer


def _distributed(output_dir: str, batch_size: str, checkpoint: str = "") -> None:
    found = {}
    trainer = distributed_trainer(output_dir, int(batch_size))
    trainer.train()
    found["losses"] = logged_losses(trainer)
    trainer = _uneven(Path(output_dir), int(batch_size))
    writes = []
    prefill = SharerCacheStore._prefill

    def count(self: SharerCacheStore, index: int, ids: torch.Tensor, mask: torch.Tensor, paths: list[Path]) -> None:
        writes.extend(path.name for path in paths)
        prefill(self, index, ids, mask, paths)

    SharerCacheStore._prefill = count
    trainer.train()
    found["uneven"], found["eval_loss"] = logged_losses(trainer), trainer.evaluate()["eval_loss"]
    found["writes"] = gather_object(writes)
    if checkpoint:
        trainer = distributed_trainer(f"{output_dir}/resumed", int(batch_size))
        trainer.train(resume_from_checkpoint=checkpoint)
        found["resumed"] = logged_losses(trainer)
    if trainer.is_world_process_zero():
        (Path(output_dir) / "found.json").write_text(json.dumps(found))


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
