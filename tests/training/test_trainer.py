"""Training: what changes and what does not, gates, logs, precisions."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from fitting_for_tests import WORDS, memory_pair
from peft import LoraConfig
from training_for_tests import (
    PROCESSOR,
    QUESTIONS,
    base_models,
    chat_rows,
    fuser_weights,
    logged_losses,
    make_model,
    make_processor,
    make_trainer,
)
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from c2c_hf import C2CDataCollator, C2CForCausalLM, C2CTrainer, C2CTrainingArguments
from c2c_hf.fusers.c2c import Gate
from c2c_hf.training.dataset import prepare_dataset


@pytest.mark.parametrize("sharers", [1, 2])
@pytest.mark.parametrize("fusion_mode", ["parallel", "sequential"])
def test_the_fuser_changes_and_nothing_else(tmp_path: Path, sharers: int, fusion_mode: str) -> None:
    model = make_model(sharers, fusion_mode=fusion_mode)
    before = {name: value.clone() for name, value in model.named_parameters()}
    configs = [str(base.config) + str(base.generation_config) for base in (model.receiver, *model.sharers)]
    trainer = make_trainer(tmp_path, model, max_steps=3, learning_rate=1e-2, warmup_steps=0)
    trainer.train()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) != name.startswith("fuser."), name
        assert value.requires_grad == name.startswith("fuser."), name
    assert [str(base.config) + str(base.generation_config) for base in (model.receiver, *model.sharers)] == configs
    assert not model.receiver.training
    optimized = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert optimized == sum(p.numel() for p in model.fuser.parameters())


def test_memorizes_the_training_data(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        make_model(fuser_hidden_size=64, fuser_intermediate_size=64, fuser_dropout=0.0),
        max_steps=80,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
    )
    receiver_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    fused = trainer.evaluate()
    with trainer.model.disable_fusion():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(receiver_loss), "as with the untrained fuser"
    assert logged_losses(trainer)[-1] < logged_losses(trainer)[0] - 1.5
    assert fused["eval_loss"] < receiver_loss - 1.5, "hard gates agree with the noisy ones"


def test_gradient_accumulation_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path,
            make_model(fuser_dropout=0.0),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
            gate_noise="none",
            learning_rate=1e-2,
        )
        trainer.train()
        runs.append(logged_losses(trainer))
    torch.testing.assert_close(*map(torch.tensor, runs), atol=1e-4, rtol=0)


def test_gradient_checkpointing_changes_nothing_but_the_memory(tmp_path: Path) -> None:
    """Noise and dropout are the same in the recomputation; base models are not checkpointed."""
    known = {field.name for field in dataclasses.fields(C2CTrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    kept: list[int] = []
    results = []
    for checkpointing in (False, True):
        kept.append(0)
        trainer = make_trainer(tmp_path, **{name: checkpointing}, max_steps=3, seed=5)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            trainer.train()
        results.append((logged_losses(trainer), fuser_weights(trainer)))
    (plain, weights), (twice, others) = results
    assert plain == twice and all(torch.equal(weights[name], others[name]) for name in weights)
    assert kept[1] < 0.7 * kept[0]


def test_temperature_and_other_logs(tmp_path: Path) -> None:
    model = make_model(initial_gate_temperature=2.0, final_gate_temperature=0.02)
    trainer = make_trainer(tmp_path, model, num_train_epochs=2, gradient_accumulation_steps=2)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(float(model.fuser[0].gate_temperature)))
    trainer.train()
    expected = [2.0 * 0.01 ** (step / 4) for step in range(4)]
    assert seen == pytest.approx([t for t in expected for _ in range(2)])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["gate_temperature"] for entry in logs] == pytest.approx(expected)
    for entry in logs:
        assert 0 < entry["mean_weight"] < 1
        assert entry["tokens_per_second"] > 0
    assert {entry["gates_open_key"] for entry in logs} <= {0, 0.5, 1}
    assert logs[-1]["gates_open_key"] == trainer.gates_open()["gates_open_key"]
    with torch.no_grad():
        for group in model.fuser[0].groups:
            group.gate.gate_logit.copy_(torch.tensor([1.0 if entry < 2 else -1.0 for entry in group.entries]))
    assert trainer.gates_open() == {"gates_open_key": 1.0, "gates_open_value": 0.0}


@pytest.mark.parametrize(
    ("noise", "share"),
    [("gumbel", 1 - math.exp(-1)), ("logistic", 0.5), ("none", None)],
    ids=["gumbel", "logistic", "none"],
)
def test_gate_noise(noise: str, share: float | None) -> None:
    gate = Gate(1)
    assert gate.gate_noise == "gumbel", "the reference's"
    gate.gate_noise = noise
    torch.manual_seed(0)
    gates = gate.soft(100_000, 1, torch.tensor(1e-3))
    assert torch.isfinite(gates).all()
    if share is None:
        assert (gates == 0.5).all()
    else:
        assert float((gates > 0.5).float().mean()) == pytest.approx(share, abs=0.01)


def test_zero_output_starts_as_the_receiver_with_open_gates(tmp_path: Path) -> None:
    model = make_model(fuser_initialization="zero_output")
    trainer = make_trainer(tmp_path, model)
    assert trainer.gates_open() == {"gates_open_key": 1.0, "gates_open_value": 1.0}
    fused = trainer.evaluate()["eval_loss"]
    with model.disable_fusion():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(fused, abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, train_sampling_strategy="sequential"
    )
    rows = [{**example} for example in trainer.train_dataset]
    token = next(i for i in rows[5]["answer_ids"] if all(i not in r["input_ids"] + r["answer_ids"] for r in rows[:5]))
    trainer.train_dataset = rows
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[token] = math.nan
    with pytest.raises(ValueError, match=r"loss of step 3 is not finite .* row 2 of the batch.*What is short"):
        trainer.train()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert all(torch.isfinite(p).all() for p in trainer.model.fuser.parameters())


def test_streaming_and_bfloat16(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    trainer = make_trainer(tmp_path, model, max_steps=5, bf16=True)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset().shuffle(seed=0, buffer_size=4)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged_losses(trainer))
    assert {p.dtype for p in model.fuser.parameters()} == {torch.float32}
    assert {p.dtype for p in model.receiver.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("fields", [{}, {"sharers": 2}, {"sharers": 2, "fusion_mode": "sequential"}], ids=str)
@pytest.mark.parametrize("adapter", [False, True])
def test_autocast_of_float32_models(tmp_path: Path, fields: dict, adapter: bool) -> None:
    """`bf16=True` with base models in float32, whose keys are then float32 and values bfloat16."""
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapter else None
    options = {"max_steps": 2, "guard_weight": 0.1, "gate_noise": "none"}
    values = []
    for bf16 in (False, True):
        model = make_model(**fields, fuser_dropout=0.0)
        trainer = make_trainer(tmp_path, model, bf16=bf16, peft_config=peft_config, **options)
        trainer.train()
        values.append([*logged_losses(trainer), trainer.evaluate()["eval_loss"]])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert values[1] == pytest.approx(values[0], rel=0.05)
    assert values[1] != values[0]


def test_autocast_of_float32_models_in_memory_mode(tmp_path: Path) -> None:
    model, processor = memory_pair(same=False, memory_rank=8, memory_hidden_size=8)
    rows = [{"prompt": "hello", "completion": "ships", "sharer_context": word * 3} for word in WORDS[:4]]
    examples = prepare_dataset(Dataset.from_list(rows), processor)
    fields = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1}
    args = C2CTrainingArguments(str(tmp_path), use_cpu=True, bf16=True, guard_weight=0.1, report_to="none", **fields)
    trainer = C2CTrainer(model, args, None, examples, examples, processor)
    trainer.train()
    assert all(math.isfinite(loss) for loss in [*logged_losses(trainer), trainer.evaluate()["eval_loss"]])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_compute_metrics_gets_predictions_beside_their_labels(tmp_path: Path, batch_size: int) -> None:
    """Whatever the batches: the loss computed from them is the evaluation's."""
    found = {}

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        found.update(logits=torch.tensor(prediction.predictions), labels=torch.tensor(prediction.label_ids))
        return {"answers": float((prediction.label_ids[:, 1:] != -100).sum())}

    trainer = make_trainer(tmp_path, per_device_eval_batch_size=batch_size, compute_metrics=metrics)
    output = trainer.evaluate()
    assert found["logits"].shape[:2] == found["labels"].shape
    loss = torch.nn.functional.cross_entropy(
        found["logits"][:, :-1].transpose(1, 2), found["labels"][:, 1:], ignore_index=-100
    )
    assert float(loss) == pytest.approx(output["eval_loss"], abs=1e-5)
    assert output["eval_answers"] == sum(len(example["answer_ids"]) for example in trainer.eval_dataset)


def test_response_fusion(tmp_path: Path) -> None:
    receiver, other = base_models()[0], base_models()[0]
    torch.manual_seed(7)
    model = C2CForCausalLM.from_receiver_and_sharers(
        receiver,
        other,
        token_alignment="identity",
        fuse_response=True,
        fuser_hidden_size=16,
        fuser_intermediate_size=16,
    )
    processor = type(PROCESSOR).from_receiver_and_sharers(PROCESSOR.tokenizer, PROCESSOR.tokenizer)
    examples = prepare_dataset(chat_rows(QUESTIONS), processor)
    args = C2CTrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, save_strategy="no", logging_steps=1)
    trainer = C2CTrainer(model, args, None, examples, processing_class=processor)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged_losses(trainer))


def test_trainer_checks_its_arguments(tmp_path: Path) -> None:
    args = C2CTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="`model` must be a C2CForCausalLM, but got LlamaForCausalLM"):
        C2CTrainer(base_models()[0], args)
    with pytest.raises(ValueError, match="Either `processing_class` or `data_collator`"):
        C2CTrainer(make_model(), args)
    assert C2CTrainer(make_model(), args, C2CDataCollator(PROCESSOR)).processing_class is None


#: Rows of every kind that fusion takes.
RAW_ROWS = {
    "messages": [{"messages": chat} for chat in QUESTIONS[:4]],
    "conversations": [
        {
            "conversations": [
                {"from": "human", "value": chat[0]["content"]},
                {"from": "gpt", "value": chat[1]["content"]},
            ]
        }
        for chat in QUESTIONS[:4]
    ],
    "choices": [{"question": f"Where are {n}?", "choices": ["a", "b"], "answer": n % 2} for n in range(4)],
    "prompt": [{"prompt": f"Where are {n}?", "completion": "Here."} for n in range(4)],
    "sharer_context": [{"prompt": "Who?", "completion": "I.", "sharer_context": word} for word in WORDS[:4]],
    "context": [{"context": word, "question": "Who?", "answers": ["I."]} for word in WORDS[:4]],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])
@pytest.mark.parametrize("kind", RAW_ROWS)
def test_raw_rows_are_tokenized(kind: str, streaming: bool, tmp_path: Path) -> None:
    rows = Dataset.from_list(RAW_ROWS[kind])
    args = C2CTrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, save_strategy="no", logging_steps=1, report_to="none", max_length=60
    )
    model, processor = make_model(), make_processor()
    given = rows.to_iterable_dataset() if streaming else rows
    if kind == "context" and streaming:
        with pytest.raises(ValueError, match="`train_dataset`: questions on passages cannot be streamed"):
            C2CTrainer(model, args, train_dataset=given, processing_class=processor)
        return
    trainer = C2CTrainer(model, args, None, given, {"a": given}, processor)
    expected = prepare_dataset(rows, processor, max_length=60)
    assert list(trainer.train_dataset) == list(trainer.eval_dataset["a"]) == list(expected)
    trainer.train()
    assert math.isfinite(logged_losses(trainer)[0])
    loss = trainer.evaluate(expected)["eval_loss"]
    assert trainer.evaluate()["eval_a_loss"] == trainer.evaluate({"b": given})["eval_b_loss"] == pytest.approx(loss)
    output = trainer.predict(given)
    assert output.predictions.shape[:2] == output.label_ids.shape
    assert output.metrics["test_loss"] == pytest.approx(loss)


def test_texts_are_tokenized_in_memory_mode(tmp_path: Path) -> None:
    model, processor = memory_pair(same=False)
    args = C2CTrainingArguments(
        str(tmp_path), use_cpu=True, continuation_length=4, min_prefix_length=3, max_prefix_length=8, seed=1
    )
    rows = Dataset.from_list([{"text": " ".join(WORDS[i : i + 12])} for i in range(3)])
    trainer = C2CTrainer(model, args, train_dataset=rows, processing_class=processor)
    lengths = {"continuation_length": 4, "min_prefix_length": 3, "max_prefix_length": 8, "seed": 1}
    assert list(trainer.train_dataset) == list(prepare_dataset(rows, processor, **lengths))
    assert all(trainer.train_dataset["is_continuation"])


def test_several_processes_tokenize(tmp_path: Path) -> None:
    args = C2CTrainingArguments(str(tmp_path), use_cpu=True, dataset_num_proc=2)
    trainer = C2CTrainer(make_model(), args, train_dataset=chat_rows(QUESTIONS), processing_class=make_processor())
    assert list(trainer.train_dataset) == list(prepare_dataset(chat_rows(QUESTIONS), make_processor()))


def test_data_that_cannot_be_tokenized(tmp_path: Path) -> None:
    args, collator = C2CTrainingArguments(str(tmp_path), use_cpu=True), C2CDataCollator(make_processor())
    model, rows = make_model(), Dataset.from_list([{"body": "hello"}])
    message = r"{} has the columns \['body'\], but needs `messages`"
    for name, datasets in (
        ("`train_dataset`", {"train_dataset": rows}),
        ("`eval_dataset`", {"eval_dataset": rows}),
        (r"`eval_dataset`\['a'\]", {"eval_dataset": {"a": rows}}),
    ):
        with pytest.raises(ValueError, match=message.format(name)):
            C2CTrainer(model, args, collator, **datasets)
    trainer = C2CTrainer(model, args, collator)
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=message.format("`(eval|test)_dataset`")):
            evaluate(rows)
    bad = Dataset.from_list([{"prompt": "hello", "completion": " "}])
    with pytest.raises(ValueError, match="Row 1 of `train_dataset`: `completion` must be a text that is not empty"):
        C2CTrainer(model, args, collator, train_dataset=bad)
    with pytest.raises(ValueError, match="`remove_unused_columns=False` to a Trainer that is not `C2CTrainer`"):
        collator([{"input_ids": [1]}])


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    """With this package's collator, and examples that keep their columns."""
    processor = make_processor()
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=1, logging_steps=1, report_to="none", remove_unused_columns=False
    )
    examples = prepare_dataset(chat_rows(QUESTIONS), processor)
    trainer = Trainer(make_model(), args, C2CDataCollator(processor), examples)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
