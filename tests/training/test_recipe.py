"""Recipes: their fields, and `c2c train`."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from fitting_for_tests import memory_pair
from tokenizers_for_tests import TEXT
from training_for_tests import CHATS, PROCESSOR, QUESTIONS, base_models, save_pair, write_rows

from c2c_hf import C2CForCausalLM
from c2c_hf.checkpoints.receiver_adapter import ADAPTER_FOLDER, has_adapter
from c2c_hf.cli.main import main
from c2c_hf.hub.training_run import TrainingRun
from c2c_hf.training.recipe import DataArguments, ModelArguments, parse_recipe


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
    run = TrainingRun.load(output)
    assert run is not None and (run.training["max_length"], run.datasets) == (128, [])
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


def test_fields_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "demo_pair: true\ntrain_data: [a.jsonl]\nlearning_rate: 1e-3\nbf16: false\nmax_steps: 10\nuse_cpu: true\n"
        "chat_template_kwargs: {enable_thinking: false}\n"
    )
    words = "--max-steps 20 --train_data b.jsonl c.jsonl --streaming --gate_noise none --no_tf32".split()[:-1]
    model, data, arguments = parse_recipe(path, [*words, "--output_dir", str(tmp_path)])
    assert isinstance(model, ModelArguments) and model.demo_pair
    assert data.train_data == ["b.jsonl", "c.jsonl"] and data.streaming
    assert DataArguments(["a.jsonl", "me/chats", "b.json.gz"]).hub_ids() == ["me/chats"]
    assert arguments.chat_template_kwargs == {"enable_thinking": False}
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
            parse_recipe(path)


def test_fields_per_sharer(tmp_path: Path) -> None:
    """One value for all sharers or one per sharer; what is not given is left to the configuration."""
    pair = ["--receiver", "a", "--sharers", "b", "c", "--output_dir", str(tmp_path), "--use_cpu"]
    model, _, _ = parse_recipe(None, pair)
    assert model.config_fields() == {}
    path = tmp_path / "recipe.yaml"
    path.write_text("fuser_hidden_size: 8\nfuser_dropout: [0.0, 0.5]\nfusion_mode: sequential\n")
    model, _, _ = parse_recipe(path, [*pair, "--num_fuser_layers", "2", "4"])
    assert model.config_fields() == {
        "fusion_mode": "sequential",
        "fuser_hidden_size": 8,
        "num_fuser_layers": [2, 4],
        "fuser_dropout": [0.0, 0.5],
    }
    receiver, *sharers = base_models(sharers=2)
    built = C2CForCausalLM.from_receiver_and_sharers(
        receiver, sharers, token_alignment="span", **model.config_fields()
    )
    assert [sharer.num_fuser_layers for sharer in built.config.sharers] == [2, 4]
    assert [sharer.fuser_hidden_size for sharer in built.config.sharers] == [8, 8]


def test_a_continued_fuser_keeps_its_configuration(tmp_path: Path, saved_pair: tuple[str, str]) -> None:
    """But for the fields that the recipe gives."""
    fields = {"fuser_hidden_size": 8, "fuser_intermediate_size": 8, "layer_alignment": "depth_normalized"}
    model = C2CForCausalLM.from_receiver_and_sharers(*saved_pair, initial_gate_temperature=2.0, **fields)
    model.save_pretrained(tmp_path / "fuser")
    PROCESSOR.save_pretrained(tmp_path / "fuser")
    words = ["--fuser", str(tmp_path / "fuser"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    model_arguments, _, _ = parse_recipe(None, [*words, "--final_gate_temperature", "0.5"])
    config = model_arguments.load()[0].config
    assert config.sharers[0].fuser_hidden_size == 8 and config.layer_alignment == "depth_normalized"
    assert (config.initial_gate_temperature, config.final_gate_temperature) == (2.0, 0.5)
    model_arguments, _, _ = parse_recipe(None, [*words, "--fuser_hidden_size", "16"])
    with pytest.raises(ValueError, match="does not fit"):
        model_arguments.load()


@pytest.mark.parametrize("recipe", ["paper", "smollm2-gemma3", "memory_reading"])
def test_recipes(recipe: str) -> None:
    path = Path(__file__).parents[2] / "examples" / "recipes" / f"{recipe}.yaml"
    model, data, arguments = parse_recipe(path, ["--use_cpu", "--bf16", "false"])
    if recipe == "paper":
        assert (model.receiver, model.sharers) == ("Qwen/Qwen3-0.6B", ["Qwen/Qwen2.5-0.5B-Instruct"])
        assert (arguments.max_steps, arguments.learning_rate, arguments.weight_decay) == (1929, 1e-4, 0.01)
        assert (arguments.gate_noise, arguments.seed, arguments.get_warmup_steps(1929)) == ("gumbel", 42, 193)
        assert 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 256
        assert data.train_split == "train[:500000]"
    elif recipe == "memory_reading":
        assert model.fuser == "memory-fit" and not model.config_fields()
        assert (arguments.distillation_weight, arguments.answer_weight, arguments.continuation_weight) == (1, 0.3, 0)
        assert (arguments.learning_rate, arguments.get_warmup_steps(1500), arguments.max_grad_norm) == (3e-4, 20, 1)
        assert (arguments.lr_scheduler_type, data.train_weights) == ("linear", [1.0, 1.0])
    else:
        assert model.demo_pair and model.config_fields()["fuser_hidden_size"] == 64


def test_memory_recipe_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe for passages, from files that its data script's columns have, on a tiny pair."""
    recipe = Path(__file__).parents[2] / "examples" / "recipes" / "memory_reading.yaml"
    model, processor = memory_pair(same=False, memory_hidden_size=4)
    names = []
    for name, base, tokenizer in (
        ("receiver", model.receiver, processor.tokenizer),
        ("sharer", model.sharers[0], processor.sharer_tokenizers[0]),
    ):
        names.append(str(tmp_path / name))
        base.save_pretrained(names[-1])
        tokenizer.save_pretrained(names[-1])
    pair = C2CForCausalLM.from_receiver_and_sharers(*names, mode="memory", memory_source_layers=1)
    pair.save_pretrained(tmp_path / "fuser")
    processor.save_pretrained(tmp_path / "fuser")
    questions = [{"context": text, "question": "Who?", "answers": ["ships"]} for text in TEXT]
    data = [
        write_rows(tmp_path / "questions.jsonl", questions),
        write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXT]),
    ]
    tests = write_rows(tmp_path / "tests.jsonl", [{"context": TEXT[1], "question": "", "answers": []}])
    words = ["--fuser", str(tmp_path / "fuser"), "--train_data", *data, "--output_dir", str(tmp_path / "out")]
    words += [
        "--excluded_data",
        tests,
        "--max_length",
        "240",
        "--continuation_length",
        "6",
        "--min_prefix_length",
        "5",
    ]
    _, data_arguments, arguments = parse_recipe(recipe, words)
    train_data, _ = data_arguments.load(processor, arguments)
    kinds = train_data["is_continuation"]
    assert set(kinds) == {True, False} and len(kinds) >= 8, "of five texts one is left out"
    _, data_arguments, arguments = parse_recipe(recipe, [*words, "--train_weights", "1", "9"])
    kinds = data_arguments.load(processor, arguments)[0]["is_continuation"]
    assert sum(kinds) > 3 * (len(kinds) - sum(kinds)), "nine times as many continuations, repeated"
    assert main(["train", str(recipe), *words, "--max_steps", "2", "--logging_steps", "1"]) == 0
    assert "Saved the fuser" in capsys.readouterr().out
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("distillation" in key for entry in state["log_history"] for key in entry)
    with pytest.raises(ValueError, match="`train_weights` must hold a number above 0 for each of the 2 `train_data`"):
        parse_recipe(recipe, [*words, "--train_weights", "1"])


def test_example_script(tmp_path: Path, saved_pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "examples" / "train.py"
    assert len(path.read_text().splitlines()) < 60
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in QUESTIONS])
    words = ["--receiver", saved_pair[0], "--sharer", saved_pair[1], "--train-data", data, "--max-steps", "2"]
    output = tmp_path / "fuser"
    monkeypatch.setattr(sys, "argv", [str(path), *words, "--hidden-size", "8", "--output-dir", str(output)])
    runpy.run_path(str(path), run_name="__main__")
    assert (output / "model.safetensors").is_file() and (output / "checkpoint-2").is_dir()
