"""`c2c inspect` and `c2c push`: what they say of a saved fuser, and what they send."""

import json
from pathlib import Path

import pytest
import torch
from conftest import close_gates, tiny_c2c
from huggingface_hub import CommitInfo, ModelCard
from processor_for_tests import processor
from safetensors.torch import load_file, save_file

import c2c_hf.hub.publish
from c2c_hf.checkpoints.describe import describe_fuser
from c2c_hf.cli.main import main


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


def test_what_a_fuser_is(folder: Path) -> None:
    described = dict(describe_fuser(folder))
    assert described["receiver"] == (
        "handed over, without a name; llama, layers 3 x (2, 8, 8) (heads, key width, value width)"
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
        "so that the answers are the receiver's own; keys of layers none; values of layers none"
    )
    assert (described["processor"], described["card"], described["code"]) == ("yes", "none", "none")
    assert described["token alignment"] == "identity, identity"


def test_nothing_is_allocated_for_what_does_not_fit(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fuser_hidden_size": 10**7}))
    with pytest.raises(ValueError, match="The checkpoint does not fit"):
        describe_fuser(folder)


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
    """What would go to the Hub; the way there is tested in test_hub.py."""
    sent: dict = {}

    def record(files, repo_id, **kwargs):
        sent.update(files=files, repo_id=repo_id, **kwargs)
        url = "https://huggingface.co/me/fuser/commit/1"
        return CommitInfo(url, commit_message="", commit_description="", oid="1")

    monkeypatch.setattr(c2c_hf.hub.publish, "upload_files", record)
    return sent


PUSH = ["--receiver", "Qwen/Qwen3-0.6B", "--sharer", "Qwen/Qwen3-1.7B", "--sharer", "google/gemma-3-270m"]


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
    assert main(["push", str(folder), "me/fuser", *PUSH]) == 0
    assert sent["files"]["README.md"].read_text().endswith("My own card.\n")


def test_an_adapter_is_pushed_along(folder: Path, sent: dict) -> None:
    (folder / "receiver_adapter").mkdir()
    (folder / "receiver_adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    save_file({"base.lora_A.weight": torch.ones(2)}, folder / "receiver_adapter/adapter_model.safetensors")
    (folder / "receiver_adapter/notes.txt").write_text("x")
    assert main(["push", str(folder), "me/fuser", *PUSH]) == 0
    adapter = {name for name in sent["files"] if name.startswith("receiver_adapter/")}
    assert adapter == {"receiver_adapter/adapter_config.json", "receiver_adapter/adapter_model.safetensors"}
    config = json.loads(sent["files"]["receiver_adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-0.6B", "a folder of this machine would be published"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (PUSH[:2], "`sharers`: the base model None is no Hub id"),
        (PUSH[2:], "`receiver`: the base model None is no Hub id"),
        ([*PUSH, "--sharer", "a/b"], "`sharers`: this fuser has 2 sharers, but got 3 names"),
        ([*PUSH[:2], "--sharer", "a//b", "--sharer", "c/d"], "`sharers`: the base model 'a//b' is no Hub id"),
        ([*PUSH, "--license", "mit"], "`license` must be 'gemma'"),
        ([*PUSH, "--evaluation", "nowhere"], "holds no metrics.json"),
    ],
)
def test_what_cannot_be_published(
    folder: Path, sent: dict, capsys: pytest.CaptureFixture, arguments: list[str], says: str
) -> None:
    assert main(["push", str(folder), "me/fuser", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not sent


def test_local_names_and_foreign_weights_are_not_published(
    folder: Path, sent: dict, capsys: pytest.CaptureFixture
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "receiver_name_or_path": str(folder)}))
    assert main(["push", str(folder), "me/fuser", *PUSH[2:]]) == 1
    assert "is no Hub id, so that nobody else could load the fuser" in capsys.readouterr().err
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "receiver.lm_head.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert main(["push", str(folder), "me/fuser", *PUSH]) == 1
    assert "holds weights that are not a fuser's (receiver.lm_head.weight, ...)" in capsys.readouterr().err
    assert main(["push", str(folder / "sharer_0"), "me/fuser"]) == 1
    assert "holds no saved fuser" in capsys.readouterr().err
    assert not sent
