"""What a run records of itself, and the model card that is written from it."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from training_for_tests import QUESTIONS, chat_rows, make_model, make_trainer
from transformers import EvalPrediction

from c2c_hf import C2CTrainer
from c2c_hf.hub.publish import publishable_files
from c2c_hf.hub.training_run import RUN_FILE, TrainingRun


def named_trainer(folder: Path, **arguments: object) -> C2CTrainer:
    """A trainer whose base models have names, as those of the Hub have."""
    model = make_model()
    model.config.receiver_name_or_path, model.config.sharers[0].name_or_path = "me/receiver", "me/sharer"
    return make_trainer(folder, model, max_steps=2, report_to="none", **arguments)


def answers(prediction: EvalPrediction) -> dict[str, float]:
    return {"answers": float((prediction.label_ids[:, 1:] != -100).sum())}


def test_card_of_a_run(tmp_path: Path) -> None:
    trainer = named_trainer(
        tmp_path, compute_metrics=answers, guard_weight=0.5, mismatched_rate=0.5, eval_strategy="steps", eval_steps=1
    )
    trainer.dataset_names = ["me/chats"]
    trainer.evaluate()
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card(license="mit", tags="tiny", model_name="me/fuser")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["tags"] == ["cache-to-cache", "c2c", "generated_from_trainer", "tiny"]
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == ("c2c_hf", "text-generation", "mit")
    assert (data["base_model"], data["base_model_relation"]) == (["me/receiver", "me/sharer"], "adapter")
    assert data["datasets"] == ["me/chats"]
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found == {
        ("evaluation_data", "loss"): pytest.approx(loss),
        ("evaluation_data", "answers"): sum(len(example["answer_ids"]) for example in trainer.eval_dataset),
    }
    for row in (
        "| `steps` | 2 |",
        "| `examples` | 8 |",
        "| `rows_per_step` | 2 |",
        "| `learning_rate` | 0.0001 |",
        "| `optim` | adamw_torch_fused |",
        "| `guard_weight` | 0.5 |",
        "| `final_gates_open_key` | ",
        f"| evaluation_data | c2c | loss | {loss:.4f} | not computed | 8 |",
    ):
        assert row in card.text, row
    assert "| `answer_weight`" not in card.text, "a default"
    assert "**No control was run**" in card.text


def test_the_saved_run_is_for_the_card_alone(tmp_path: Path) -> None:
    """It is written with every save, taken for the card, and not uploaded."""
    trainer = named_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        run = TrainingRun.load(folder)
        assert run is not None and run.training["steps"] == 2
        assert run.results == [], "the evaluation was that of the untrained fuser"
        assert RUN_FILE not in publishable_files(folder)
    trainer.evaluate(metric_key_prefix="eval_b")
    trainer.save_model(str(tmp_path / "other"))
    run = TrainingRun.load(tmp_path / "other")
    assert run is not None and [row["task"] for row in run.results] == ["b"]
    assert TrainingRun.load(tmp_path / "nowhere") is None
    for content in ("{", "[]", json.dumps({"training": [], "datasets": [], "results": []})):
        (tmp_path / RUN_FILE).write_text(content)
        with pytest.raises(ValueError, match="training_run.json is damaged or has another structure"):
            TrainingRun.load(tmp_path)


def test_results_of_the_best_checkpoint_only(tmp_path: Path) -> None:
    trainer = named_trainer(
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    run = TrainingRun.load(tmp_path)
    assert run is not None and run.results == []


def test_streamed_training_data(tmp_path: Path) -> None:
    trainer = named_trainer(tmp_path)
    trainer.train_dataset = chat_rows(QUESTIONS).to_iterable_dataset()
    trainer.save_model()
    run = TrainingRun.load(tmp_path)
    assert run is not None and "examples" not in run.training
