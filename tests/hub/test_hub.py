"""Publishing and loading through the real client and a Hub on loopback, with and without failures."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from hub_client_for_tests import (
    TEXTS,
    Failure,
    HubClient,
    answers,
    change_receiver,
    publish_pair,
    push,
    train_and_push,
    write_card,
)
from hub_server_for_tests import TOKEN, Fault, HubServer
from huggingface_hub import ModelCard

import c2c_hf
from c2c_hf.checkpoints.remote_code import CODE_FILES

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
    *("chat_template.jinja", *TOKENIZER, *(f"sharer_0/{name}" for name in TOKENIZER)),
}
#: Files of a new repository.
FIRST = {".gitattributes"}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    client = HubClient(hub.endpoint, tmp_path_factory.mktemp("home"))
    assert client(publish_pair, str(tmp_path_factory.mktemp("bases"))) is None
    yield client
    client.pool.shutdown()


@pytest.fixture(autouse=True)
def no_faults(hub: HubServer) -> Iterator[None]:
    yield
    hub.faults.clear()


def assert_failed(outcome: object, kind: str, *parts: str) -> None:
    assert isinstance(outcome, Failure), outcome
    assert kind in outcome.classes
    for part in parts:
        assert part in outcome.message


def assert_same(found: object, expected: object) -> None:
    assert not isinstance(found, Failure), found
    assert np.array_equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_a_round_trip(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    url = client(push, "me/fuser")
    assert url.startswith(f"{hub.endpoint}/me/fuser/commit/")
    assert hub.files("me/fuser").keys() == FILES | FIRST
    assert hub.commits("me/fuser") == ["Upload fuser"]
    weights = safetensors.torch.load(hub.files("me/fuser")["model.safetensors"])
    assert weights
    assert all(name.startswith("fuser.") for name in weights), "a base model's weight was published"
    config = json.loads(hub.files("me/fuser")["config.json"])
    assert config["receiver_name_or_path"] == "org/receiver"
    assert config["receiver_revision"] == hub.repos["org/receiver"].branches["main"]
    expected = client(answers)
    assert_same(client(answers, "me/fuser"), expected)
    # Base models come by name, at the recorded commit: that the receiver's repository went on changes nothing.
    assert client(change_receiver, str(tmp_path)) is None
    assert_same(client(answers, "me/fuser", own_bases=False, cache_dir=str(tmp_path / "cache")), expected)
    assert_same(client(answers, "me/fuser", cache_dir=str(tmp_path / "cache"), local_files_only=True), expected)


def test_options_of_publishing(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    client(push, "me/private", private=True, commit_message="First words", tags="mine")
    assert hub.repos["me/private"].private
    assert hub.commits("me/private") == ["First words"]
    assert b"- mine\n" in hub.files("me/private")["README.md"]
    assert_same(client(answers, "me/private"), client(answers))
    anonymous = client(answers, "me/private", token=False, cache_dir=str(tmp_path))
    assert_failed(anonymous, "OSError", "me/private")

    main = hub.files("me/private")
    client(push, "me/private", revision="try")
    assert hub.files("me/private") == main
    assert_same(client(answers, "me/private", revision="try"), client(answers))
    client(push, "me/private", create_pr=True)
    assert hub.files("me/private") == main
    assert hub.files("me/private", "refs/pr/1")["model.safetensors"] != main["model.safetensors"]
    assert_same(client(answers, "me/private", revision="refs/pr/1"), client(answers))


def test_several_fusers_in_one_repository(hub: HubServer, client: HubClient) -> None:
    expected = {}
    for folder in ("general", "code"):
        client(push, "me/two", subfolder=folder)
        expected[folder] = client(answers)
    paths = {f"{folder}/{name}" for folder in expected for name in FILES}
    assert hub.files("me/two").keys() == paths | FIRST
    for folder, answer in expected.items():
        assert_same(client(answers, "me/two", subfolder=folder), answer)
    for folder in ("../two", "/general", "a/../../b"):
        assert_failed(client(answers, "me/two", subfolder=folder), "ValueError", "`subfolder` must be a folder inside")
        assert_failed(client(push, "me/two", subfolder=folder), "ValueError", "`subfolder` must be a folder inside")


def test_what_an_earlier_fuser_left_is_deleted(hub: HubServer, client: HubClient) -> None:
    client(push, "me/shards")
    client(push, "me/shards", max_shard_size="8KB")
    names = hub.files("me/shards").keys()
    assert "model.safetensors" not in names, "it would be read in place of the shards"
    assert "model.safetensors.index.json" in names
    assert len(hub.commits("me/shards")) == 2
    assert_same(client(answers, "me/shards"), client(answers))
    client(push, "me/shards")
    assert hub.files("me/shards").keys() == FILES | FIRST
    assert client(push, "me/shards", again=True).startswith(hub.endpoint)
    assert len(hub.commits("me/shards")) == 3, "nothing has changed, so there is no commit"


_FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
model = AutoModelForCausalLM.from_pretrained("me/code", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("me/code", trust_remote_code=True)
inputs = processor(json.loads(sys.argv[1]))
with torch.no_grad():
    logits = model(**inputs).logits
out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
print(json.dumps([logits.tolist(), out.tolist()]))
"""


def test_code_finds_the_installed_package(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    client(push, "me/code", with_code=True)
    assert hub.files("me/code").keys() == FILES | FIRST | CODE_FILES
    assert "trust_remote_code=True" in hub.files("me/code")["README.md"].decode()
    expected = client(answers)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    search_path = os.pathsep.join([str(Path(c2c_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", _FRESH, json.dumps(TEXTS)]
    environment = {**os.environ, **settings, "PYTHONPATH": search_path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    logits, ids = json.loads(done.stdout.splitlines()[-1])
    assert_same((np.array(logits, dtype=np.float32), ids), expected)
    assert_failed(
        client(push, "me/code", with_code=True, subfolder="x"),
        "ValueError",
        "`subfolder` must be None with `with_code=True`",
    )
    client(push, "me/code")
    assert hub.files("me/code").keys() == FILES | FIRST, "code of an earlier fuser was not deleted"


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault("POST", "/repos/create", 401), "HfHubHTTPError", "401"),
        (Fault("POST", "/repos/create", 500), "HfHubHTTPError", "500"),
        (Fault("POST", "/commit/", 403), "HfHubHTTPError", "403 Forbidden"),
        (Fault("POST", "/commit/", 409), "HfHubHTTPError", "409"),
        (Fault("POST", "/commit/", 500), "HfHubHTTPError", "500"),
        (Fault("POST", "/commit/", "drop"), "HTTPError", "disconnected"),
        (Fault("POST", "/preupload/", "drop", times=9), "HTTPError", "disconnected"),
        (Fault("PUT", "/storage/", "cut", times=9), "RuntimeError", "Error while uploading 'model.safetensors'"),
        (Fault("PUT", "/storage/", "corrupt"), "RuntimeError", "Error while uploading 'model.safetensors'"),
    ],
    ids=lambda value: f"{value.path}-{value.kind}" if isinstance(value, Fault) else None,
)
def test_uploads_that_fail(hub: HubServer, client: HubClient, fault: Fault, kind: str, message: str) -> None:
    """huggingface_hub retries and reports by itself; nothing is committed, and the same upload succeeds later."""
    if "me/faults" not in hub.repos:
        client(push, "me/faults")
    before, commits = hub.files("me/faults"), hub.commits("me/faults")
    if fault.kind == 401:
        hub.faults.append(Fault("GET", "/api/models/me/faults", 401))
    hub.faults.append(fault)
    assert_failed(client(push, "me/faults"), kind, message)
    assert fault.times < 9
    assert hub.files("me/faults") == before
    assert hub.commits("me/faults") == commits
    hub.faults.clear()
    client(push, "me/faults", again=True)
    assert hub.files("me/faults")["model.safetensors"] != before["model.safetensors"]
    assert len(hub.commits("me/faults")) == len(commits) + 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/preupload/", 500),
        Fault("PUT", "/storage/", 500),
        Fault("PUT", "/storage/", "cut"),
        Fault("POST", "/info/lfs/objects/batch", 500),
    ],
    ids=lambda fault: f"{fault.path}-{fault.kind}",
)
def test_uploads_that_recover(hub: HubServer, client: HubClient, fault: Fault) -> None:
    repo_id = f"me/recovers-{fault.kind}{fault.path.replace('/', '-').strip('-')}"
    hub.faults.append(fault)
    url = client(push, repo_id)
    assert not isinstance(url, Failure), url
    assert fault.times == 0, "the fault did not happen"
    assert hub.commits(repo_id) == ["Upload fuser"]
    assert hub.files(repo_id).keys() == FILES | FIRST


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault("GET", "/storage/", "drop", times=9), "OSError", "could not be downloaded"),
        (Fault("GET", "/storage/", 500, times=9), "OSError", "could not be downloaded"),
        (
            Fault("GET", "/storage/", "corrupt"),
            "ValueError",
            "model.safetensors was damaged during the download",
        ),
    ],
    ids=lambda value: str(value.kind) if isinstance(value, Fault) else None,
)
def test_downloads_that_fail(
    hub: HubServer, client: HubClient, tmp_path: Path, fault: Fault, kind: str, message: str
) -> None:
    client(push, "me/downloads")
    hub.faults.append(fault)
    assert_failed(client(answers, "me/downloads", cache_dir=str(tmp_path)), kind, message)
    assert not list(tmp_path.rglob("*.incomplete"))
    assert not list(tmp_path.rglob("model.safetensors"))
    hub.faults.clear()
    assert_same(client(answers, "me/downloads", cache_dir=str(tmp_path)), client(answers))


def test_a_download_that_is_cut_goes_on(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    client(push, "me/cut")
    hub.faults.append(Fault("GET", "/storage/", "cut", times=2))
    assert_same(client(answers, "me/cut", cache_dir=str(tmp_path)), client(answers))
    assert [status for _, path, status in hub.log if path.startswith("/storage/")][-1] == 206


def test_a_full_disk(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    client(push, "me/full")
    before, expected = hub.files("me/full"), client(answers)
    assert len(before["model.safetensors"]) > 20_000 > len(before["config.json"])
    outcome = client(answers, "me/full", limit=20_000, cache_dir=str(tmp_path))
    assert_failed(outcome, "OSError", "File too large")
    assert not list(tmp_path.rglob("*.incomplete"))
    assert_same(client(answers, "me/full", cache_dir=str(tmp_path)), expected)
    outcome = client(push, "me/full", limit=20_000)
    assert_failed(outcome, "OSError", "The fuser could not be written", "File too large")
    assert hub.files("me/full") == before
    client(push, "me/full", again=True)
    assert hub.files("me/full")["model.safetensors"] != before["model.safetensors"]


def test_a_missing_token(client: HubClient, hub: HubServer) -> None:
    assert_failed(client(push, "me/nobody", token=False), "HfHubHTTPError", "401")
    assert "me/nobody" not in hub.repos
    assert_failed(client(answers, "me/nobody"), "OSError", "me/nobody")


def test_licenses_are_read_off_the_cards(client: HubClient, hub: HubServer) -> None:
    assert_failed(client(push, "me/license", license=None), "ValueError", "`license` must be given", "org/receiver")
    assert "me/license" not in hub.repos
    client(write_card, "org/receiver", "mit")
    assert_failed(client(push, "me/license", license=None), "ValueError", "`license` must be given", "org/sharer")
    client(write_card, "org/sharer", "llama3.2")
    assert client(push, "me/license", license=None).startswith(hub.endpoint)
    assert b"license: llama3.2\n" in hub.files("me/license")["README.md"]
    assert "NOTICE" not in hub.files("me/license")
    client(write_card, "org/sharer", "gemma")
    assert_failed(client(push, "me/license", license="mit"), "ValueError", "`license` must be 'gemma'")
    client(push, "me/license", license=None)
    assert b"license: gemma\n" in hub.files("me/license")["README.md"]
    assert hub.files("me/license")["NOTICE"].startswith(b"Gemma is provided under and subject to")


def test_the_trainer_publishes_with_a_card_of_the_run(client: HubClient, tmp_path: Path) -> None:
    # Another test gives it Gemma's.
    client(write_card, "org/sharer", "apache-2.0")
    outcome = client(train_and_push, str(tmp_path), "me/trained")
    assert not isinstance(outcome, Failure), outcome
    card, files = outcome
    assert set(files) - FIRST == FILES, "neither checkpoints nor the run's record"
    data = ModelCard(card).data.to_dict()
    assert data["tags"] == ["cache-to-cache", "c2c", "generated_from_trainer", "tiny"]
    assert data["datasets"] == ["me/chats"]
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "loss"
    assert "| `steps` | 1 |" in card
    assert_same(client(answers, "me/trained", revision="trained"), client(answers))
