"""Training of memory fusers: the parts of the loss against computations row by row, and resumed runs."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from fitting_for_tests import memory_pair
from tokenizers_for_tests import TEXT
from torch.nn.functional import cross_entropy, kl_div
from training_for_tests import fuser_weights, logged_losses, make_model

from c2c_hf import C2CForCausalLM, C2CProcessor, C2CTrainer, C2CTrainingArguments
from c2c_hf.training import trainer as trainer_module
from c2c_hf.training.batch_transforms import mismatch_sharers
from c2c_hf.training.collator import TrainingBatch
from c2c_hf.training.dataset import prepare_dataset
from c2c_hf.training.losses import distillation_losses

CONTEXTS = [TEXT[0], TEXT[1], "The user counted ships at the café."]
CHATS = [
    {
        "sharer_context": context,
        "messages": [
            {"role": "user", "content": "Who counted ships?"},
            {"role": "assistant", "content": "The keeper."},
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": "Paris"},
        ][: 2 * turns],
    }
    for context, turns in zip(CONTEXTS, (1, 2, 1), strict=True)
]
LENGTHS = {"continuation_length": 6, "min_prefix_length": 5}


def examples_of(processor: C2CProcessor, plain_text: bool = False) -> Dataset:
    """Three chats and two continuations."""
    rows = [Dataset.from_list(CHATS), Dataset.from_list([{"text": text} for text in TEXT[3:]])]
    return concatenate_datasets([prepare_dataset(part, processor, plain_text=plain_text, **LENGTHS) for part in rows])


def random_pair(seed: int = 3) -> tuple[C2CForCausalLM, C2CProcessor]:
    model, processor = memory_pair(same=False, memory_hidden_size=4)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.fuser.parameters():
            parameter.normal_(0, 0.2)
    return model, processor


def memory_trainer(folder: Path, model: C2CForCausalLM, processor: C2CProcessor, **fields: object) -> C2CTrainer:
    fields = {"per_device_train_batch_size": 5, "logging_steps": 1, "save_strategy": "no", **fields}
    args = C2CTrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **fields)
    return C2CTrainer(model, args, None, examples_of(processor), None, processor)


@pytest.mark.parametrize("plain_text", [False, True])
def test_no_distillation_loss_where_the_memory_is_exact(plain_text: bool) -> None:
    """One model, the identity as map: with plain texts both prefill the same, with a chat template not."""
    model, processor = memory_pair(same=True, sink=0)
    with torch.no_grad():
        for memory_map in model.fuser[0].maps:
            memory_map.out_proj.weight.copy_(torch.eye(*memory_map.out_proj.weight.shape))
            memory_map.out_proj.bias.zero_()
        examples = list(examples_of(processor, plain_text))
        batch = TrainingBatch.from_inputs(trainer_module.C2CDataCollator(processor)(examples))
        losses = distillation_losses(model, batch, model(**batch.model_inputs()).logits)
        assert len(losses) == batch.num_targets().sum()
        assert (losses.abs().max().item() < 1e-4) is plain_text
        model.fuser[0].maps[0].out_proj.bias.fill_(3.0)
        changed = distillation_losses(model, batch, model(**batch.model_inputs()).logits)
        assert changed.mean().item() > 1e-3


def targets_of(example: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose logits predict a target, and the targets."""
    start = len(example["input_ids"])
    places = torch.tensor([start + i for i, given in enumerate(example["is_target"]) if given])
    ids = torch.tensor(example["input_ids"] + example["answer_ids"])
    return places - 1, ids[places]


def logits_of_row(model: C2CForCausalLM, example: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in front of the targets: of the pair, and of the receiver that prefills everything."""
    ids = torch.tensor([example["input_ids"] + example["answer_ids"]])
    alignment = torch.tensor([example["sharer_alignment"][0] + [-1] * len(example["answer_ids"])])
    places, _ = targets_of(example)
    pair = model(ids, sharer_input_ids=torch.tensor(example["sharer_input_ids"]), sharer_alignment=alignment).logits
    return pair[0, places], model.receiver(ids).logits[0, places]


def divergence(receiver: torch.Tensor, pair: torch.Tensor) -> float:
    logprobs = [logits.log_softmax(-1) for logits in (pair, receiver)]
    return kl_div(*logprobs, reduction="batchmean", log_target=True).item()


def test_the_loss_is_that_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers, continuations and a mismatched row, each computed alone and without padding."""
    model, processor = random_pair()
    weights = {"answer_weight": 0.3, "continuation_weight": 0.7, "distillation_weight": 1.5, "guard_weight": 2.0}
    trainer = memory_trainer(tmp_path, model, processor, **weights)
    drawn = torch.tensor([True, False, False, False, False])
    candidates = []

    def draw(is_candidate: torch.Tensor, rate: float) -> torch.Tensor:
        candidates.append((is_candidate.tolist(), rate))
        return drawn

    monkeypatch.setattr(trainer_module, "draw_rows", draw)
    examples = list(trainer.train_dataset)
    model.train()
    loss = trainer.compute_loss(model, trainer.data_collator(examples))
    assert candidates == [([True, True, True, False, False], 0.25)], "continuations are never mismatched"
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.fuser.parameters())
    assert not any(parameter.grad is not None for parameter in model.receiver.parameters())

    model.eval()
    (swapped,) = prepare_dataset(Dataset.from_list([{**CHATS[0], "sharer_context": CONTEXTS[1]}]), processor)
    (without,) = prepare_dataset(Dataset.from_list([{"messages": CHATS[0]["messages"]}]), processor)
    with torch.no_grad():
        expected = 2.0 * divergence(logits_of_row(model, without)[1], logits_of_row(model, swapped)[0])
        for rows, weight in (([1, 2], 0.3), ([3, 4], 0.7)):
            pairs = [logits_of_row(model, examples[row]) for row in rows]
            pair, receiver = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            targets = torch.cat([targets_of(examples[row])[1] for row in rows])
            own = weight * cross_entropy(pair, targets).item() + 1.5 * divergence(receiver, pair)
            expected += len(rows) * own
    assert loss.item() == pytest.approx(expected / 5, abs=1e-4)
    assert {"answer_loss", "answer_distillation_loss", "continuation_loss", "guard_loss"} <= trainer._logged.keys()


def test_one_kind_of_rows_has_the_loss_per_token(tmp_path: Path) -> None:
    """As without kinds: the mean over all tokens."""
    model, processor = random_pair()
    trainer = memory_trainer(tmp_path, model, processor)
    batch = trainer.data_collator(list(trainer.train_dataset)[:3])
    model.train()
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)


@pytest.mark.parametrize("grid", ["receiver", "sharer"])
def test_mismatched_rows_have_all_slots_of_another(grid: str) -> None:
    """Tokens, masks, slots and sharer inputs equal those of the question with the other context."""
    _, processor = memory_pair(same=False, memory_grid=grid)
    collate = trainer_module.C2CDataCollator(processor)
    rows = [CHATS[0], CHATS[2]]
    batch = TrainingBatch.from_inputs(collate(list(prepare_dataset(Dataset.from_list(rows), processor))))
    swapped_rows = [
        {**row, "sharer_context": other["sharer_context"]} for row, other in zip(rows, rows[::-1], strict=True)
    ]
    expected = TrainingBatch.from_inputs(collate(list(prepare_dataset(Dataset.from_list(swapped_rows), processor))))
    mismatched = mismatch_sharers(batch, torch.arange(2), memory=True)
    for row in range(2):
        real = mismatched.attention_mask[row].bool()
        wanted = expected.attention_mask[row].bool()
        for name in ("input_ids", "labels"):
            assert torch.equal(getattr(mismatched, name)[row][real], getattr(expected, name)[row][wanted])
        assert torch.equal(mismatched.sharer_alignment[0][row][real], expected.sharer_alignment[0][row][wanted])
        assert torch.equal(mismatched.sharer_input_ids[0][row], expected.sharer_input_ids[0][row])
        assert (mismatched.sharer_alignment[0][row][~real] == -1).all()
    one = mismatch_sharers(batch, torch.tensor([1]), memory=True)
    assert one.sharer_alignment[0].shape[0] == 1 and one.labels.shape == one.input_ids.shape


def test_select_rows_keeps_choices_and_kinds(tmp_path: Path) -> None:
    batch = TrainingBatch(
        *torch.arange(12).view(3, 4).expand(3, 3, 4),
        sharer_input_ids=[torch.arange(3)[:, None]],
        sharer_attention_mask=[torch.ones(3, 1)],
        sharer_alignment=[torch.zeros(3, 4)],
        wrong_answer_ids=torch.tensor([[1], [2], [3], [4]]),
        wrong_answer_rows=torch.tensor([0, 1, 1, 2]),
        is_continuation=torch.tensor([True, False, False]),
    )
    chosen = batch.select_rows(torch.tensor([2, 1]))
    assert chosen.input_ids[:, 0].tolist() == [8, 4]
    assert sorted(zip(chosen.wrong_answer_rows.tolist(), chosen.wrong_answer_ids[:, 0].tolist(), strict=True)) == [
        (0, 4),
        (1, 2),
        (1, 3),
    ]
    assert not chosen.is_continuation.any()
    assert batch.select_rows(torch.tensor([], dtype=torch.long)).wrong_answer_ids is None


def test_resuming_is_exact(tmp_path: Path) -> None:
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "distillation_weight": 1.0,
        "guard_weight": 1.0,
        "mismatched_rate": 0.5,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
    }
    straight = memory_trainer(tmp_path / "straight", *random_pair(), **options)
    straight.train()
    torch.manual_seed(123)
    resumed = memory_trainer(tmp_path / "resumed", *random_pair(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert logged_losses(resumed) == logged_losses(straight)
    assert len(set(logged_losses(straight))) == 6
    for key in ("guard_loss", "answer_distillation_loss", "continuation_loss"):
        assert any(entry.get(key, 0) > 0 for entry in straight.state.log_history), key
    expected = fuser_weights(straight)
    for name, value in fuser_weights(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_distillation_is_learned(tmp_path: Path) -> None:
    fields = {"max_steps": 30, "learning_rate": 2e-2, "answer_weight": 0.0, "continuation_weight": 0.0}
    trainer = memory_trainer(tmp_path, *random_pair(), distillation_weight=1.0, **fields)
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[-1] < 0.5 * losses[0]


def test_distillation_needs_the_receivers_grid(tmp_path: Path) -> None:
    for model in (make_model(), memory_pair(same=False, memory_grid="sharer")[0]):
        args = C2CTrainingArguments(str(tmp_path), use_cpu=True, distillation_weight=1.0)
        with pytest.raises(
            ValueError, match="`distillation_weight` must be 0 without `mode='memory'` and `memory_grid"
        ):
            C2CTrainer(model, args, lambda examples: {})


def test_choice_loss_refuses_chats_of_several_turns(tmp_path: Path) -> None:
    model, processor = random_pair()
    trainer = memory_trainer(tmp_path, model, processor, choice_weight=1.0)
    examples = [{**example, "wrong_answer_ids": [[5]]} for example in list(trainer.train_dataset)[:3]]
    model.train()
    assert trainer.compute_loss(model, trainer.data_collator(examples[::2])).item() > 0
    with pytest.raises(ValueError, match="`choice_weight` must be 0 with chats whose turns are one example"):
        trainer.compute_loss(model, trainer.data_collator(examples))
