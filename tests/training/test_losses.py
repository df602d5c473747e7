"""The losses of a batch, and the changes of a batch that training makes."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from training_for_tests import fuser_weights, make_model, make_trainer

from c2c_hf import C2CForCausalLM, C2CTrainer
from c2c_hf.training.batch_transforms import draw_rows, keep_random_spans, mismatch_sharers
from c2c_hf.training.collator import TrainingBatch
from c2c_hf.training.dataset import prepare_dataset
from c2c_hf.training.losses import guard_losses


@pytest.mark.parametrize("sharers", [1, 2])
def test_loss_of_a_batch_is_that_of_its_rows(tmp_path: Path, sharers: int) -> None:
    """The mean over all answer tokens, equal to the model's own loss on every row without padding."""
    model = make_model(sharers)
    with torch.no_grad():
        for name, parameter in model.fuser.named_parameters():
            if "gate_logit" in name:
                parameter.fill_(1.0)
            else:
                parameter.mul_(3.0)
    trainer = make_trainer(tmp_path, model)
    examples, collate = list(trainer.train_dataset), trainer.data_collator
    model.eval()
    batch = collate(examples)
    loss = trainer.compute_loss(model, dict(batch)).detach()
    total, count = 0.0, 0
    for example in examples:
        row = {name: value for name, value in collate([example]).items() if name != "logits_to_keep"}
        answers = len(example["answer_ids"])
        total, count = total + model(**row).loss.item() * answers, count + answers
    assert float(loss) == pytest.approx(total / count, abs=1e-5)
    outputs = model(**batch)
    assert float(loss) == pytest.approx(outputs.loss.item(), abs=1e-5)
    assert outputs.logits.shape[1] == max(len(e["answer_ids"]) for e in examples) + 1, "no logits of prompts"
    with model.disable_fusion():
        assert float(trainer.compute_loss(model, dict(batch))) != pytest.approx(float(loss), abs=1e-3)


def test_evaluation_loss_counts_every_token_alike(tmp_path: Path) -> None:
    """Whatever the batches: answers of unequal lengths, batches of unequal sizes."""
    model = make_model()
    losses = [
        make_trainer(tmp_path, model, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (1, 3, 8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    trainer = make_trainer(tmp_path, model)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in trainer.eval_dataset:
            tokens = len(example["answer_ids"])
            total += float(model.eval()(**trainer.data_collator([example])).loss) * tokens
            count += tokens
    assert losses[0] == pytest.approx(total / count, abs=1e-5)


def test_random_spans_of_fused_positions() -> None:
    alignment = torch.arange(60).repeat(300, 1)
    alignment[:, ::3] = -1
    alignment[0] = -1
    torch.manual_seed(0)
    (spans,) = keep_random_spans([alignment], 0.25)
    kept = spans >= 0
    assert (spans[kept] == alignment[kept]).all()
    assert not kept[0].any()
    counts = kept[1:].sum(1)
    assert counts.min() >= 10 and counts.max() <= 40
    assert 10 <= counts.min() < 13 and 37 < counts.max() <= 40, "shares between a quarter and all"
    for row, before in zip(kept[1:], (alignment >= 0)[1:], strict=True):
        places = row.nonzero().flatten()
        assert torch.equal(row[places[0] : places[-1] + 1], before[places[0] : places[-1] + 1]), "one contiguous span"
    first, second = keep_random_spans([alignment, alignment.flip(0)], 0.5)
    assert torch.equal(first[1:-1] >= 0, second[1:-1] >= 0), "sharers fuse at the same positions"
    assert torch.equal(keep_random_spans([alignment], 1.0)[0], alignment)


def test_mismatched_sharers() -> None:
    batch = TrainingBatch.from_inputs(
        {
            "input_ids": torch.zeros(3, 4),
            "attention_mask": torch.ones(3, 4),
            "labels": torch.zeros(3, 4),
            "sharer_input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]),
            "sharer_attention_mask": torch.tensor([[1, 1], [0, 1], [1, 1]]),
            "sharer_alignment": torch.tensor([[0, 1, 1, -1], [-1, 1, -1, -1], [0, -1, -1, -1]]),
        }
    )
    mismatched = mismatch_sharers(batch, torch.arange(3), memory=False)
    assert mismatched.sharer_input_ids[0].tolist() == [[3, 4], [5, 6], [1, 2]]
    assert mismatched.sharer_attention_mask[0].tolist() == [[0, 1], [1, 1], [1, 1]]
    assert mismatched.sharer_alignment[0].tolist() == [[1, 1, 1, -1], [-1, 0, -1, -1], [0, -1, -1, -1]]
    (last,) = mismatch_sharers(batch, torch.tensor([2]), memory=False).sharer_input_ids
    assert last.tolist() == [[1, 2]]
    assert batch.sharer_input_ids[0].tolist() == [[1, 2], [3, 4], [5, 6]], "the batch itself stays as it is"


def test_unknown_columns_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"`inputs` has the unknown columns \['weight'\]"):
        TrainingBatch.from_inputs({"weight": 1, "labels": torch.zeros(1, 1)})


def test_guard_loss(tmp_path: Path) -> None:
    """Zero where the gates are closed; a gradient, and only on the fuser, where they are open."""
    trainer = make_trainer(tmp_path, guard_weight=1.0)
    model, batch = trainer.model, trainer.data_collator(list(trainer.train_dataset)[:3])
    mismatched = mismatch_sharers(TrainingBatch.from_inputs(batch), torch.arange(3), memory=False)
    model.eval()
    assert guard_losses(model, mismatched).abs().max().item() == pytest.approx(0.0, abs=1e-4)
    model.train()
    guard = guard_losses(model, mismatched)
    assert len(guard) == int((batch["labels"] != -100).sum())
    guard = guard.sum()
    assert guard.item() > 1e-4
    guard.backward()
    assert all(p.grad is not None for p in model.fuser.parameters())


def test_rows_are_drawn_at_a_rate() -> None:
    torch.manual_seed(0)
    candidates = torch.tensor([True, False, True, True])
    drawn = torch.stack([draw_rows(candidates, 0.25) for _ in range(400)])
    assert not drawn[:, 1].any()
    assert drawn[:, candidates].float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert draw_rows(candidates, 1.0).tolist() == candidates.tolist()
    assert draw_rows(torch.ones(3, dtype=torch.bool), 1.0).sum() == 2, "one row keeps its own loss"


def choice_trainer(folder: Path, model: C2CForCausalLM, **arguments) -> C2CTrainer:
    rows = [
        {"question": "Who is at the lighthouse?", "choices": ["the keeper", "ships", "no one"], "answer": 0},
        {"question": "What is blue?", "choices": ["autumn", "the sky"], "answer": 1},
        {"question": "When do ships come?", "choices": ["before breakfast", "hello", "Paris", "never"], "answer": 0},
    ]
    trainer = make_trainer(folder, model, **arguments)
    template = {"answer_format": "text", "question_template": "Question: {question}\nAnswer:", "plain_choices": True}
    trainer.train_dataset = prepare_dataset(Dataset.from_list(rows), trainer.processing_class, **template)
    return trainer


def test_choice_loss_equals_separate_forward_passes(tmp_path: Path) -> None:
    """Answers that continue the cache of their prompt have the loss of one forward pass over prompt and answer."""
    model = make_model(sharers=2, fuser_initialization="zero_output", fuser_dropout=0.0)
    torch.manual_seed(0)
    for parameter in model.fuser.parameters():
        parameter.data.normal_(0, 0.3)
    trainer = choice_trainer(tmp_path, model, choice_weight=2.0, gate_noise="none")
    examples, collate = list(trainer.train_dataset), trainer.data_collator
    model.train()
    loss = trainer.compute_loss(model, collate(examples))
    total, tokens = 0.0, 0
    for example in examples:
        means = []
        for answer in [example["answer_ids"], *example["wrong_answer_ids"]]:
            batch = collate(
                [{**example, "answer_ids": answer, "is_target": [True] * len(answer), "wrong_answer_ids": []}]
            )
            assert "wrong_answer_ids" not in batch
            means.append(-model(**batch, use_cache=False).loss)
        total += means[0].item() * -len(example["answer_ids"])
        total += 2.0 * -torch.stack(means).log_softmax(0)[0].item()
        tokens += len(example["answer_ids"])
    assert loss.item() == pytest.approx(total / tokens, abs=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in model.fuser.parameters())


def test_choices_are_learned(tmp_path: Path) -> None:
    fields = {"max_steps": 30, "learning_rate": 2e-2, "per_device_train_batch_size": 3, "gate_noise": "none"}
    sizes = {"fuser_hidden_size": 32, "fuser_initialization": "zero_output", "fuser_dropout": 0.0}
    trainer = choice_trainer(tmp_path, make_model(**sizes), choice_weight=1.0, **fields)
    trainer.train()
    choices = [entry["choice_loss"] for entry in trainer.state.log_history if "choice_loss" in entry]
    assert choices[-1] < 0.2 < choices[0]


def test_rows_without_aligned_positions(tmp_path: Path) -> None:
    """A batch without aligned positions changes nothing, and raises no error."""
    trainer = make_trainer(tmp_path, max_steps=2, guard_weight=0.1, weight_decay=0.0)
    trainer.train_dataset = [
        {**example, "sharer_alignment": [[-1] * len(row) for row in example["sharer_alignment"]]}
        for example in trainer.train_dataset
    ]
    before = fuser_weights(trainer)
    trainer.train()
    for name, value in fuser_weights(trainer).items():
        assert torch.equal(value, before[name]) or "temperature" in name
