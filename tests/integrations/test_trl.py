"""TRL's trainer for supervised fine-tuning, with a fuser."""

import inspect
import math
from pathlib import Path

import pytest
from datasets import Dataset
from fitting_for_tests import WORDS, memory_pair
from peft import LoraConfig
from training_for_tests import QUESTIONS, chat_rows, logged_losses, make_model, make_processor, make_trainer
from transformers import EvalPrediction
from transformers.trainer_utils import get_last_checkpoint

from c2c_hf import C2CForCausalLM

trl = pytest.importorskip("trl", reason="needs `pip install trl`")
from c2c_hf.integrations.trl import C2CSFTConfig, C2CSFTTrainer  # noqa: E402

FIELDS = {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none"}


def test_raw_chats_train_as_with_the_own_trainer(tmp_path: Path) -> None:
    args = C2CSFTConfig(str(tmp_path / "trl"), **FIELDS, save_steps=2, learning_rate=1e-2)
    model, rows = make_model(), chat_rows(QUESTIONS)
    trainer = C2CSFTTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=make_processor())
    assert isinstance(trainer, trl.SFTTrainer) and isinstance(args, trl.SFTConfig)
    assert model.forward.__func__ is C2CForCausalLM.forward, "TRL's own forward pass is gone"
    trainer.train()
    other = make_trainer(tmp_path / "own", max_steps=2, learning_rate=1e-2)
    other.train()
    assert logged_losses(trainer) == logged_losses(other)
    entry = trainer.state.log_history[0]
    assert {"gates_open_key", "gate_temperature", "mean_weight"} <= set(entry)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"])
    checkpoint = get_last_checkpoint(str(tmp_path / "trl"))
    assert checkpoint is not None and not (tmp_path / "trl" / "README.md").exists()
    loaded = C2CForCausalLM.from_pretrained(checkpoint, receiver=model.receiver, sharers=list(model.sharers))
    assert loaded.config.num_sharers == 1


@pytest.mark.parametrize("mode", ["fusion", "memory"])
def test_conversational_prompts_and_completions(mode: str, tmp_path: Path) -> None:
    """As TRL writes them, with an adapter, metrics, and streamed."""
    model, processor = (make_model(), make_processor()) if mode == "fusion" else memory_pair(same=False, memory_rank=4)
    rows = Dataset.from_list(
        [
            {"prompt": chat[:1], "completion": chat[1:], **({"sharer_context": WORDS[0]} if mode == "memory" else {})}
            for chat in QUESTIONS[:4]
        ]
    )
    shapes = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        shapes.append((prediction.predictions.shape[:2], prediction.label_ids.shape))
        return {"answers": 1.0}

    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = C2CSFTConfig(str(tmp_path), **FIELDS, save_strategy="no")
    trainer = C2CSFTTrainer(
        model,
        args,
        train_dataset=rows.to_iterable_dataset(),
        eval_dataset={"a": rows},
        processing_class=processor,
        peft_config=adapter,
        compute_metrics=metrics,
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged_losses(trainer))
    assert trainer.evaluate()["eval_a_answers"] == 1.0
    assert shapes[0][0] == shapes[0][1]


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    for name, value in (
        ("packing", True),
        ("padding_free", True),
        ("completion_only_loss", False),
        ("loss_type", "dft"),
        ("activation_offloading", True),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be .*, but got {value!r}"):
            C2CSFTConfig(str(tmp_path), use_cpu=True, **{name: value})
    rows, processor = chat_rows(QUESTIONS), make_processor()
    with pytest.raises(TypeError, match="`args` must be a C2CSFTConfig, .* but got SFTConfig"):
        C2CSFTTrainer(
            make_model(),
            trl.SFTConfig(str(tmp_path), use_cpu=True, activation_checkpointing=False),
            processing_class=processor,
        )
    args = C2CSFTConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="`formatting_func` must be None"):
        C2CSFTTrainer(make_model(), args, train_dataset=rows, processing_class=processor, formatting_func=str)


def test_the_reason_still_holds(tmp_path: Path) -> None:
    """`SFTTrainer` itself replaces the forward pass by one that needs the hidden states of the whole text."""
    model, processor = make_model(), make_processor()
    args = trl.SFTConfig(str(tmp_path), **FIELDS, bf16=False, activation_checkpointing=False)
    trainer = trl.SFTTrainer(model, args, train_dataset=chat_rows(QUESTIONS), processing_class=processor)
    assert "fused_lm_head" in inspect.signature(model.forward, follow_wrapped=False).parameters
    with pytest.raises(ValueError, match="`sharer_input_ids` must be given"):
        trainer.train()
