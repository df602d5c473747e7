"""10,000 steps of a tiny pair on streamed rows: memory stays where it is."""

from pathlib import Path
from typing import Any

import pytest
from training_for_tests import QUESTIONS, chat_rows, make_model, make_trainer
from transformers import TrainerCallback

from c2c_hf import C2CTrainer

STEPS, WARMUP, MEGABYTES = 10_000, 2_000, 16

psutil = pytest.importorskip("psutil", reason="memory is measured with psutil, of the extra `[test]`")


class RecordMemory(TrainerCallback):
    def __init__(self) -> None:
        self.megabytes: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.megabytes[state.global_step] = psutil.Process().memory_info().rss / 2**20


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_memory_is_flat(tmp_path: Path) -> None:
    options = {"max_steps": STEPS, "logging_steps": 500, "guard_weight": 0.1}
    trainer = make_trainer(
        tmp_path, make_model(), save_strategy="steps", save_steps=2500, save_total_limit=1, **options
    )
    rows = chat_rows(QUESTIONS * (STEPS // 40)).to_iterable_dataset().shuffle(seed=0, buffer_size=100)
    memory = RecordMemory()
    trainer = C2CTrainer(
        trainer.model, trainer.args, None, rows, processing_class=trainer.processing_class, callbacks=[memory]
    )
    trainer.train()
    print({step: round(value, 1) for step, value in memory.megabytes.items()})  # noqa: T201
    growth = max(value for step, value in memory.megabytes.items() if step > WARMUP) - memory.megabytes[WARMUP]
    assert growth < MEGABYTES
