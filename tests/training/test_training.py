"""Training: what changes and what does not, losses, resuming, killed runs, two processes, the command line."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import enlarge_weights
from datasets import Dataset
from safetensors.torch import load_file
from test_training_data import CHATS, chat_rows, make_processor, write_rows
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.trainer_utils import get_last_checkpoint

from c2c_hf import C2CDataCollator, C2CForCausalLM, C2CTrainer, C2CTrainingArguments
from c2c_hf.checkpoints.receiver_adapter import ADAPTER_FOLDER, has_adapter
from c2c_hf.cli.main import main
from c2c_hf.fusers.c2c import Gate
from c2c_hf.training.collator import other_rows, random_spans
from c2c_hf.training.dataset import prepare_dataset
from c2c_hf.training.losses import guard_loss
from c2c_hf.training.recipe import ModelArguments, parse_training_config

PROCESSOR = make_processor()
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
QUESTIONS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in [
        ("What is the capital of France?", "Paris."),
        ("Is the keeper at the café?", "No, at the lighthouse."),
        ("Say hello to the ships.", "hello ships"),
        ("What is blue?", "The sky."),
        ("How many ships before breakfast?", "forty-seven"),
        ("What is short?", "Autumn."),
        ("Where is it?", "for i in range(10)"),
        ("Who is naïve?", "The user"),
    ]
]


def base_models(sharers: int = 1, dtype: torch.dtype = torch.float32) -> list:
    tokenizers = [PROCESSOR.tokenizer, *make_processor(sharers=sharers).sharer_tokenizers]
    models = []
    for index, tokenizer in enumerate(tokenizers):
        torch.manual_seed(index)
        make = LlamaConfig if index == 0 else Qwen3Config
        config = make(vocab_size=len(tokenizer), num_hidden_layers=2 + index, **_SIZES)
        models.append(enlarge_weights(AutoModelForCausalLM.from_config(config, dtype=dtype)))
    return models


def make_model(sharers: int = 1, dtype: torch.dtype = torch.float32, **fields) -> C2CForCausalLM:
    receiver, *others = base_models(sharers, dtype)
    torch.manual_seed(7)
    fields = {"fuser_hidden_size": 16, "fuser_intermediate_size": 24, "token_alignment": "span", **fields}
    return C2CForCausalLM.from_receiver_and_sharers(receiver, others, **fields)


def make_trainer(folder: Path | str, model: C2CForCausalLM | None = None, **arguments) -> C2CTrainer:
    model = make_model() if model is None else model
    processor = make_processor(sharers=model.config.num_sharers)
    examples = prepare_dataset(chat_rows(QUESTIONS), processor)
    fields = {"per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    peft_config = arguments.pop("peft_config", None)
    args = C2CTrainingArguments(output_dir=str(folder), use_cpu=True, **{**fields, **arguments})
    return C2CTrainer(model, args, None, examples, examples, processor, peft_config)


def losses(trainer: C2CTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fuser_weights(trainer: C2CTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.fuser.state_dict().items()}


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


def test_learns_by_heart(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        make_model(fuser_hidden_size=64, fuser_intermediate_size=64, fuser_dropout=0.0),
        max_steps=80,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
    )
    alone = trainer.evaluate()["eval_loss"]
    trainer.train()
    fused = trainer.evaluate()
    with trainer.model.disable_fusion():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(alone), "untrained and switched off are the receiver"
    assert losses(trainer)[-1] < losses(trainer)[0] - 1.5
    assert fused["eval_loss"] < alone - 1.5, "hard gates agree with the noisy ones"


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
        runs.append(losses(trainer))
    torch.testing.assert_close(*map(torch.tensor, runs), atol=1e-4, rtol=0)


def test_gradient_checkpointing_changes_nothing_but_the_memory(tmp_path: Path) -> None:
    """Noise and dropout are the same in the second pass; base models know nothing of it."""
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
        results.append((losses(trainer), fuser_weights(trainer)))
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


def test_resuming_is_exact(tmp_path: Path) -> None:
    """Dropout, gate noise, spans, guard and shuffling all draw random numbers; epochs end between the steps."""
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "min_fused_fraction": 0.3,
        "guard_weight": 0.5,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
    }
    straight = make_trainer(tmp_path / "straight", **options)
    straight.train()
    torch.manual_seed(123)
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert losses(resumed) == losses(straight)
    assert len(losses(resumed)) == 6
    assert all(entry["guard_loss"] > 0 for entry in straight.state.log_history if "loss" in entry)
    expected = fuser_weights(straight)
    for name, value in fuser_weights(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_checkpoints_hold_the_fuser_alone(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=1e-2,
    )
    trainer.train()
    trainer.save_model()
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) == {f"fuser.{name}" for name in trainer.model.fuser.state_dict()}
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text())
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    for name, value in load_file(best / "model.safetensors").items():
        assert torch.equal(value, weights[name]), "the best model is loaded at the end"
    assert not (tmp_path / ".incomplete").exists()
    receiver, *sharers = base_models()
    loaded = C2CForCausalLM.from_pretrained(best, receiver=receiver, sharers=sharers)
    for name, value in loaded.fuser.state_dict().items():
        assert torch.equal(value, weights[f"fuser.{name}"])
    assert type(PROCESSOR).from_pretrained(best).token_alignments == ["span"]


def test_checkpoints_of_others_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    other = make_trainer(tmp_path, make_model(fuser_hidden_size=8), max_steps=2)
    with pytest.raises(ValueError, match="does not fit"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


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


def test_random_spans() -> None:
    alignment = torch.arange(60).repeat(300, 1)
    alignment[:, ::3] = -1
    alignment[0] = -1
    torch.manual_seed(0)
    spans = random_spans(alignment, 0.25)
    kept = spans >= 0
    assert (spans[kept] == alignment[kept]).all()
    assert not kept[0].any()
    counts = kept[1:].sum(1)
    assert counts.min() >= 10 and counts.max() <= 40
    assert 10 <= counts.min() < 13 and 37 < counts.max() <= 40, "shares between a quarter and all"
    for row, before in zip(kept[1:], (alignment >= 0)[1:], strict=True):
        places = row.nonzero().flatten()
        assert torch.equal(row[places[0] : places[-1] + 1], before[places[0] : places[-1] + 1]), "one contiguous span"
    first, second = random_spans([alignment, alignment.flip(0)], 0.5)
    assert torch.equal(first[1:-1] >= 0, second[1:-1] >= 0), "sharers fuse at the same positions"
    assert torch.equal(random_spans(alignment, 1.0), alignment)


def test_other_rows() -> None:
    inputs = {
        "input_ids": torch.zeros(3, 4),
        "sharer_input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]),
        "sharer_attention_mask": torch.tensor([[1, 1], [0, 1], [1, 1]]),
        "sharer_alignment": torch.tensor([[0, 1, 1, -1], [-1, 1, -1, -1], [0, -1, -1, -1]]),
    }
    mixed = other_rows(inputs)
    assert mixed["sharer_input_ids"].tolist() == [[3, 4], [5, 6], [1, 2]]
    assert mixed["sharer_attention_mask"].tolist() == [[0, 1], [1, 1], [1, 1]]
    assert mixed["sharer_alignment"].tolist() == [[1, 1, 1, -1], [-1, 0, -1, -1], [0, -1, -1, -1]]


def test_guard_loss(tmp_path: Path) -> None:
    """Nothing to guard against where the gates are shut; a gradient, and only on the fuser, where they are open."""
    trainer = make_trainer(tmp_path, guard_weight=1.0)
    model, batch = trainer.model, trainer.data_collator(list(trainer.train_dataset)[:3])
    asked = {"use_cache": False, "labels": None}
    model.eval()
    assert float(guard_loss(model, batch, asked, batch["labels"])) == pytest.approx(0.0, abs=1e-4)
    model.train()
    guard = guard_loss(model, batch, asked, batch["labels"])
    assert float(guard) > 1e-4
    guard.backward()
    assert all(p.grad is not None for p in model.fuser.parameters())
    torch.manual_seed(1)
    with_guard = trainer.compute_loss(model, dict(batch))
    trainer.args.guard_weight = 0.0
    torch.manual_seed(1)
    assert float(with_guard) > float(trainer.compute_loss(model, dict(batch)))


def test_rows_that_fuse_nothing(tmp_path: Path) -> None:
    """A batch that no sharer is aligned with is trained on without effect, and without an error."""
    trainer = make_trainer(tmp_path, max_steps=2, guard_weight=0.1, weight_decay=0.0)
    trainer.train_dataset = [
        {**example, "sharer_alignment": [[-1] * len(row) for row in example["sharer_alignment"]]}
        for example in trainer.train_dataset
    ]
    before = fuser_weights(trainer)
    trainer.train()
    for name, value in fuser_weights(trainer).items():
        assert torch.equal(value, before[name]) or "temperature" in name


def test_streaming_and_bfloat16(tmp_path: Path) -> None:
    model = make_model(dtype=torch.bfloat16)
    trainer = make_trainer(tmp_path, model, max_steps=5, bf16=True)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset().shuffle(seed=0, buffer_size=4)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert {p.dtype for p in model.fuser.parameters()} == {torch.float32}
    assert {p.dtype for p in model.receiver.parameters()} == {torch.bfloat16}


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
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_arguments_check_themselves(tmp_path: Path) -> None:
    for field, value, message in (
        ("preset", "best", r"`preset` must be one of \['default', 'paper'\], but got 'best'"),
        ("gate_noise", "normal", "`gate_noise` must be one of .*'normal'"),
        ("min_fused_fraction", 0.0, r"`min_fused_fraction` must be in \(0, 1\], but got 0.0"),
        ("guard_weight", -1.0, "`guard_weight` must be at least 0, but got -1.0"),
        ("max_length", 1, "`max_length` must be at least 2, but got 1"),
        ("remove_unused_columns", True, "`remove_unused_columns` must be False"),
    ):
        with pytest.raises(ValueError, match=message):
            C2CTrainingArguments(str(tmp_path), use_cpu=True, **{field: value})
    with pytest.raises(ValueError, match="`per_device_train_batch_size` must be at least 2, but got 1"):
        C2CTrainingArguments(str(tmp_path), use_cpu=True, guard_weight=1.0, per_device_train_batch_size=1)
    assert C2CTrainingArguments(str(tmp_path), use_cpu=True).gate_noise == "logistic"
    paper = C2CTrainingArguments(str(tmp_path), use_cpu=True, preset="paper")
    assert (paper.gate_noise, paper.min_fused_fraction, paper.guard_weight) == ("gumbel", 1.0, 0.0)
    assert C2CTrainingArguments(str(tmp_path), use_cpu=True, preset="paper", gate_noise="none").gate_noise == "none"


def test_trainer_checks_its_arguments(tmp_path: Path) -> None:
    args = C2CTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="`model` must be a C2CForCausalLM, but got LlamaForCausalLM"):
        C2CTrainer(base_models()[0], args)
    with pytest.raises(ValueError, match="Either `processing_class` or `data_collator`"):
        C2CTrainer(make_model(), args)
    assert C2CTrainer(make_model(), args, C2CDataCollator(PROCESSOR)).processing_class is None


# ---------------------------------------------------------------------- other processes


def run_worker(*words: str, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    )
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), str(here.parents[2])])
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    command = [sys.executable, *launcher, str(here), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The same global batches, fuser and losses; the second sharer is not read by every process in every step."""
    run_worker("distributed", str(tmp_path / "two"), "2", processes=2)
    run_worker("distributed", str(tmp_path / "one"), "4")
    one, two = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two"))
    assert len(one) == 5 and max(one) - min(one) > 1e-3
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=1e-4, rtol=0)
    weights, expected = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("two", "one"))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=0)
    assert (tmp_path / "two" / "checkpoint-4" / "rng_state_1.pth").is_file()


def test_a_run_killed_while_it_saves_resumes(tmp_path: Path) -> None:
    killed = run_worker("killed", str(tmp_path), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert (tmp_path / ".incomplete" / "checkpoint-4" / "model.safetensors").is_file(), "it was half written"
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint="auto")
    straight = make_trainer(tmp_path / "straight", **options)
    straight.train(resume_from_checkpoint="auto")
    assert losses(resumed) == losses(straight)
    expected = fuser_weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in fuser_weights(resumed).items())
    assert not (tmp_path / ".incomplete").exists()


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
        (Path(output_dir) / "losses.json").write_text(json.dumps(losses(trainer)))


def _killed(output_dir: str) -> None:
    trainer = make_trainer(output_dir, max_steps=6, save_strategy="steps", save_steps=2, learning_rate=1e-2)
    save = trainer._save_optimizer_and_scheduler

    def save_or_die(folder: str) -> None:
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        save(folder)

    trainer._save_optimizer_and_scheduler = save_or_die
    trainer.train()


# ---------------------------------------------------------------------- the command line


def save_pair(folder: Path) -> tuple[str, str]:
    folders = []
    for index, model in enumerate(base_models()):
        tokenizer = [PROCESSOR.tokenizer, *PROCESSOR.sharer_tokenizers][index]
        folders.append(str(folder / f"base_{index}"))
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders[0], folders[1]


@pytest.fixture
def saved_pair(tmp_path: Path) -> tuple[str, str]:
    return save_pair(tmp_path)


def test_command_line(tmp_path: Path, saved_pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "receiver": saved_pair[0],
        "sharers": [saved_pair[1]],
        "fuser_hidden_size": 8,
        "fuser_intermediate_size": 8,
        "train_data": [write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS + QUESTIONS])],
        "eval_data": [write_rows(tmp_path / "eval.jsonl", [{"messages": chat} for chat in QUESTIONS[:2]])],
        "eval_strategy": "epoch",
        "max_length": 128,
        "max_steps": 100,
        "use_cpu": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config) + "learning_rate: 1e-3\n")
    output = tmp_path / "fuser"
    words = ["train", str(tmp_path / "config.yaml"), "--max_steps", "2", "--output_dir", str(output)]
    assert main(words) == 0
    assert "Saved the fuser" in capsys.readouterr().out
    model = C2CForCausalLM.from_pretrained(output)
    assert model.config.sharers[0].fuser_hidden_size == 8
    assert type(PROCESSOR).from_pretrained(output)("hello")["input_ids"].shape[0] == 1
    assert json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["max_steps"] == 2
    for resume in ("auto", "true", str(output / "checkpoint-2")):
        assert main([*words, "--max_steps", "3", "--resume_from_checkpoint", resume]) == 0
        assert (output / "checkpoint-3").is_dir()
    assert main([*words, "--train_data", "missing.jsonl"]) == 1
    assert "'missing.jsonl' does not exist" in capsys.readouterr().err
    assert main([*words, "--learning_rat", "1"]) == 1
    assert "--learning_rat" in capsys.readouterr().err


def test_command_line_of_the_baseline(
    tmp_path: Path, saved_pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """`c2c train` with `lora_rank` and `train_fuser: false`: the baseline, end to end."""
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in QUESTIONS])
    config = {"receiver": saved_pair[0], "sharers": [saved_pair[1]], "train_data": [data], "use_cpu": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "max_steps": 2, "train_fuser": False}))
    words = ["train", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "run"), "--lora_rank", "4"]
    assert main(words) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / ADAPTER_FOLDER / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, saved_pair[0])
    assert has_adapter(C2CForCausalLM.from_pretrained(tmp_path / "run").receiver)
    assert main([*words[:-2]]) == 1
    assert "leaves nothing to train" in capsys.readouterr().err


def test_config_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "demo_pair: true\ntrain_data: [a.jsonl]\nlearning_rate: 1e-3\nbf16: false\nmax_steps: 10\nuse_cpu: true\n"
        "chat_template_kwargs: {enable_thinking: false}\n"
    )
    words = "--max-steps 20 --train_data b.jsonl c.jsonl --streaming --gate_noise none --no_tf32".split()[:-1]
    model, data, arguments = parse_training_config(path, [*words, "--output_dir", str(tmp_path)])
    assert isinstance(model, ModelArguments) and model.demo_pair
    assert data.train_data == ["b.jsonl", "c.jsonl"] and data.streaming
    assert data.chat_template_kwargs == {"enable_thinking": False}
    assert (arguments.learning_rate, arguments.max_steps, arguments.gate_noise) == (1e-3, 20, "none")
    assert not arguments.bf16 and arguments.weight_decay == 0.01
    for content, message in (
        ("learning_rte: 1", "unknown fields: learning_rte"),
        ("- a", "must hold `field: value` lines"),
        ("learning_rate: fast\ndemo_pair: true", "learning_rate.*'fast'"),
        ("max_steps: 1", "Name one pair"),
        ("demo_pair: true\nload_sharers: false", "`load_sharers: false` needs a `fuser`"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            parse_training_config(path)


@pytest.mark.parametrize("recipe", ["paper", "smollm2-gemma3"])
def test_recipes(recipe: str) -> None:
    path = Path(__file__).parents[2] / "examples" / "recipes" / f"{recipe}.yaml"
    model, data, arguments = parse_training_config(path, ["--use_cpu", "--bf16", "false"])
    if recipe == "paper":
        assert (model.receiver, model.sharers) == ("Qwen/Qwen3-0.6B", ["Qwen/Qwen2.5-0.5B-Instruct"])
        assert (arguments.max_steps, arguments.learning_rate, arguments.weight_decay) == (1929, 1e-4, 0.01)
        assert (arguments.gate_noise, arguments.seed, arguments.get_warmup_steps(1929)) == ("gumbel", 42, 193)
        assert 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 256
        assert data.train_split == "train[:500000]"
    else:
        assert model.demo_pair and 64 <= model.fuser_hidden_size <= 256


def test_example_script(tmp_path: Path, saved_pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    path = Path(__file__).parents[2] / "examples" / "train.py"
    assert len(path.read_text().splitlines()) < 60
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in QUESTIONS])
    words = ["--receiver", saved_pair[0], "--sharer", saved_pair[1], "--train-data", data, "--max-steps", "2"]
    output = tmp_path / "fuser"
    monkeypatch.setattr(sys, "argv", [str(path), *words, "--hidden-size", "8", "--output-dir", str(output)])
    runpy.run_path(str(path), run_name="__main__")
    assert (output / "model.safetensors").is_file() and (output / "checkpoint-2").is_dir()


if __name__ == "__main__":
    # The killed run computes as the test does that compares with it, with as many threads.
    if sys.argv[1] == "distributed":
        torch.set_num_threads(1)
    {"distributed": _distributed, "killed": _killed}[sys.argv[1]](*sys.argv[2:])


def choice_trainer(folder: Path, model: C2CForCausalLM, **arguments) -> C2CTrainer:
    rows = [
        {"question": "Who is at the lighthouse?", "choices": ["the keeper", "ships", "nobody at all"], "answer": 0},
        {"question": "What is blue?", "choices": ["autumn", "the sky"], "answer": 1},
        {"question": "When do ships come?", "choices": ["before breakfast", "hello", "Paris", "never"], "answer": 0},
    ]
    trainer = make_trainer(folder, model, **arguments)
    template = {"answer_format": "text", "question_template": "Question: {question}\nAnswer:", "plain_choices": True}
    trainer.train_dataset = prepare_dataset(Dataset.from_list(rows), trainer.processing_class, **template)
    return trainer


def test_choice_loss_is_that_of_every_answer_by_itself(tmp_path: Path) -> None:
    """Prompts read once and answers going on from their cache: as one pass over each prompt with each answer."""
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
            batch = collate([{**example, "answer_ids": answer, "wrong_answer_ids": []}])
            assert "wrong_answer_ids" not in batch
            means.append(-model(**batch, use_cache=False).loss)
        total += means[0].item() * -len(example["answer_ids"])
        total += 2.0 * -torch.stack(means).log_softmax(0)[0].item()
        tokens += len(example["answer_ids"])
    assert float(loss) == pytest.approx(total / tokens, abs=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in model.fuser.parameters())


def test_choices_are_learned(tmp_path: Path) -> None:
    fields = {"max_steps": 30, "learning_rate": 2e-2, "per_device_train_batch_size": 3, "gate_noise": "none"}
    sizes = {"fuser_hidden_size": 32, "fuser_initialization": "zero_output", "fuser_dropout": 0.0}
    trainer = choice_trainer(tmp_path, make_model(**sizes), choice_weight=1.0, **fields)
    trainer.train()
    choices = [entry["choice_loss"] for entry in trainer.state.log_history if "choice_loss" in entry]
    assert choices[-1] < 0.2 < choices[0]


def test_zero_output_starts_as_the_receiver_with_open_gates(tmp_path: Path) -> None:
    model = make_model(fuser_initialization="zero_output")
    trainer = make_trainer(tmp_path, model)
    assert trainer.gates_open() == {"gates_open_key": 1.0, "gates_open_value": 1.0}
    fused = trainer.evaluate()["eval_loss"]
    with model.disable_fusion():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(fused, abs=1e-6)


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
