"""`describe_fuser`, `c2c inspect` and `c2c push`: descriptions of saved fusers, and the files that are uploaded."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close_gates, tiny_c2c
from huggingface_hub import CommitInfo, ModelCard, ModelCardData
from processor_for_tests import processor
from safetensors.torch import load_file, save_file

import c2c_hf.hub.licenses
import c2c_hf.hub.publish
from c2c_hf import C2CConfig
from c2c_hf.checkpoints.describe import describe_fuser
from c2c_hf.checkpoints.download import SHIPPED_FUSERS
from c2c_hf.cli.main import main
from c2c_hf.hub.publish import publish_fuser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_c2c("llama", ["qwen3", "gemma3"])
    with torch.no_grad():
        # The order of entries: keys of all layers, then their values.
        model.fuser[0].groups[0].gate.gate_logit.copy_(torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0]))
    close_gates(model.fuser[1])
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    return tmp_path


def test_description_of_a_fuser(folder: Path) -> None:
    described = dict(describe_fuser(folder))
    assert described["receiver"] == (
        "given as a model without a name; llama, layers 3 x (2, 8, 8) (heads, key width, value width)"
    )
    assert "qwen3, layers 5 x (1, 12, 12)" in described["sharer 0"]
    assert "gemma3_text, layers 4 x (1, 16, 16)" in described["sharer 1"]
    fuser = tiny_c2c("llama", ["qwen3", "gemma3"]).fuser[0]
    count = sum(parameter.numel() for parameter in fuser.parameters())
    assert described["fuser 0"].startswith(
        f"{count:,} weights, {4 * count / 1000:.1f} kB; hidden 20, intermediate 28, 3 l"
    )
    assert described["gates 0"] == "3 of 6 gates are open; keys of layers 0-1; values of layers 2"
    assert described["gates 1"].endswith(
        "so the answers are the receiver's own; keys of layers none; values of layers none"
    )
    assert (described["processor"], described["card"], described["code"]) == ("yes", "none", "none")
    assert described["token alignment"] == "identity, identity"
    assert described["mode"] == "fusion, parallel, layer alignment terminal, answers not fused"


@pytest.mark.parametrize(
    ("fields", "maps"),
    [
        ({}, "3 sharer layers per receiver layer, 2 token embeddings per slot, full rank"),
        (
            {"memory_rank": 4, "memory_hidden_size": 6, "memory_source_layers": 2, "memory_token_embeddings": 0},
            "2 sharer layers per receiver layer, rank 4, hidden 6",
        ),
    ],
)
def test_description_of_a_memory_fuser(tmp_path: Path, fields: dict, maps: str) -> None:
    model = tiny_c2c("llama", ["qwen3"], mode="memory", token_alignment="span", memory_sink_tokens=2, **fields)
    model.save_pretrained(tmp_path)
    described = dict(describe_fuser(tmp_path))
    count = sum(parameter.numel() for parameter in model.fuser.parameters())
    assert described["fuser 0"].startswith(f"{count:,} weights, ")
    assert described["fuser 0"].endswith(maps)
    assert described["mode"] == "memory, slots on the receiver's grid, sink tokens 2"
    assert "gates 0" not in described


@pytest.mark.parametrize("name", SHIPPED_FUSERS)
def test_description_of_a_shipped_fuser(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    described = dict(describe_fuser(name))
    assert described["receiver"].startswith("HuggingFaceTB/SmolLM2-135M-Instruct; llama, layers 30 x (3, 64, 64)")
    assert described["mode"].startswith("memory" if name == "memory" else "fusion")
    assert main(["inspect", name]) == 0
    assert described["fuser 0"] in capsys.readouterr().out
    # A folder of the same name is preferred.
    tiny_c2c().save_pretrained(tmp_path / name)
    assert "llama, layers 3 x" in dict(describe_fuser(name))["receiver"]


@pytest.mark.parametrize("mode", ["fusion", "memory"])
def test_sizes_that_do_not_fit_the_weights_are_not_allocated(tmp_path: Path, mode: str) -> None:
    fields = {"token_alignment": "span", "memory_rank": 4} if mode == "memory" else {}
    tiny_c2c(mode=mode, **fields).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sharers"][0]["fuser_hidden_size"] = config["memory_rank"] = 10**7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="The checkpoint does not fit"):
        describe_fuser(tmp_path)


def test_a_configuration_without_a_pair(tmp_path: Path) -> None:
    C2CConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no saved fuser, since its configuration names no pair"):
        describe_fuser(tmp_path)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A fuser\n")
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "card             license mit, 0 results\n" in printed
    assert "gates 0          3 of 6 gates are open" in printed
    assert main(["inspect", str(folder), "--subfolder", "../x"]) == 1
    assert "`subfolder` must be a folder inside the repository" in capsys.readouterr().err
    assert main(["inspect", str(folder / "nowhere")]) == 1
    assert len(capsys.readouterr().err.splitlines()) <= 3


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The files and arguments of an upload; the upload itself is tested in test_hub.py."""
    sent: dict = {}

    def record(files, repo_id, **kwargs):
        sent.update(files=files, repo_id=repo_id, **kwargs)
        url = "https://huggingface.co/me/fuser/commit/1"
        return CommitInfo(url, commit_message="", commit_description="", oid="1")

    monkeypatch.setattr(c2c_hf.hub.publish, "upload_files", record)
    card = SimpleNamespace(card_data=ModelCardData(license="apache-2.0"))
    monkeypatch.setattr(c2c_hf.hub.licenses, "model_info", lambda name, token: card)
    return sent


NAMES = {"receiver": "Qwen/Qwen3-0.6B", "sharers": ["Qwen/Qwen3-1.7B", "google/gemma-3-270m"]}
PUSH = ["--receiver", NAMES["receiver"], *(word for name in NAMES["sharers"] for word in ("--sharer", name))]


def test_pushing(folder: Path, sent: dict, capsys: pytest.CaptureFixture) -> None:
    (folder / "how.yaml").write_text("max_steps: 300\n")
    (folder / "checkpoint-1").mkdir()
    for name in ("optimizer.pt", "secret.py", "checkpoint-1/model.safetensors", "other.safetensors", ".env"):
        (folder / name).write_text("x")
    options = ["--training", str(folder / "how.yaml"), "--dataset", "me/chats", "--tag", "tiny", "--message", "First"]
    assert main(["push", str(folder), "me/fuser", *PUSH, *options, "--create-pr", "--revision", "try"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/fuser/commit/1\n"
    assert sent["repo_id"] == "me/fuser"
    assert (sent["create_pr"], sent["revision"], sent["commit_message"]) == (True, "try", "First")
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert set(sent["files"]) == {
        *(
            "README.md",
            "NOTICE",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "processor_config.json",
        ),
        *("chat_template.jinja", *tokenizer, *(f"sharer_0/{name}" for name in tokenizer)),
    }
    config = json.loads(sent["files"]["config.json"])
    assert config["receiver_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert [sharer["name_or_path"] for sharer in config["sharers"]] == ["Qwen/Qwen3-1.7B", "google/gemma-3-270m"]
    card = ModelCard(sent["files"]["README.md"].decode())
    assert card.data.license == "gemma"
    assert card.data.datasets == ["me/chats"]
    assert "| `max_steps` | 300 |" in card.text
    assert sent["files"]["NOTICE"].startswith(b"Gemma is provided under")
    (folder / "README.md").write_text("---\nlicense: gemma\n---\nMy own card.\n")
    (folder / "NOTICE").write_text("My own notice.\n")
    assert main(["push", str(folder), "me/fuser", *PUSH]) == 0
    assert sent["files"]["README.md"].read_text().endswith("My own card.\n")
    own, gemma = sent["files"]["NOTICE"].decode().splitlines()
    assert own == "My own notice."
    assert gemma.startswith("Gemma is provided under and subject to the Gemma Terms of Use")


def test_an_adapter_is_published_along(folder: Path, sent: dict) -> None:
    (folder / "receiver_adapter").mkdir()
    (folder / "receiver_adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    save_file({"base.lora_A.weight": torch.ones(2)}, folder / "receiver_adapter/adapter_model.safetensors")
    (folder / "receiver_adapter/notes.txt").write_text("x")
    publish_fuser(folder, "me/fuser", **NAMES)
    adapter = {name for name in sent["files"] if name.startswith("receiver_adapter/")}
    assert adapter == {"receiver_adapter/adapter_config.json", "receiver_adapter/adapter_model.safetensors"}
    config = json.loads(sent["files"]["receiver_adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-0.6B", "a folder of this machine would be published"


def test_recorded_revisions_are_those_of_the_recorded_models(folder: Path, sent: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(receiver_name_or_path=NAMES["receiver"], receiver_revision="a" * 40)
    for sharer in config["sharers"]:
        sharer.update(name_or_path=NAMES["sharers"][0], revision="b" * 40)
    (folder / "config.json").write_text(json.dumps(config))
    publish_fuser(folder, "me/fuser", **NAMES)
    published = json.loads(sent["files"]["config.json"])
    assert (published["receiver_name_or_path"], published["receiver_revision"]) == (NAMES["receiver"], "a" * 40)
    first, second = published["sharers"]
    assert (first["name_or_path"], first["revision"]) == (NAMES["sharers"][0], "b" * 40)
    assert (second["name_or_path"], second["revision"]) == (NAMES["sharers"][1], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharers": None}, "`sharers`: the base model None is not a Hub id"),
        ({"receiver": None}, "`receiver`: the base model None is not a Hub id"),
        ({"sharers": [*NAMES["sharers"], "a/b"]}, "`sharers`: this fuser has 2 sharers, but got 3 names"),
        ({"sharers": NAMES["sharers"][0]}, "`sharers`: this fuser has 2 sharers, but got 1 names"),
        ({"sharers": ["a//b", "c/d"]}, "`sharers`: the base model 'a//b' is not a Hub id"),
        ({"license": "mit"}, "`license` must be 'gemma'"),
        ({"evaluation": "nowhere"}, "holds no metrics.json"),
    ],
)
def test_what_cannot_be_published(folder: Path, sent: dict, arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        publish_fuser(folder, "me/fuser", **{**NAMES, **arguments})
    assert not sent


def test_local_names_and_foreign_weights_are_not_published(
    folder: Path, sent: dict, capsys: pytest.CaptureFixture
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "receiver_name_or_path": str(folder)}))
    with pytest.raises(ValueError, match="is not a Hub id, so the fuser could not be loaded elsewhere"):
        publish_fuser(folder, "me/fuser", sharers=NAMES["sharers"])
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "receiver.lm_head.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert main(["push", str(folder), "me/fuser", *PUSH]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds weights that are not a fuser's (receiver.lm_head.weight, ...)" in line
    with pytest.raises(OSError, match="holds no saved fuser"):
        publish_fuser(folder / "sharer_0", "me/fuser")
    assert not sent
