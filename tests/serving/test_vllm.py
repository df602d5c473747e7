"""Prepared slots in an engine: answers equal `model.generate`, contexts never mix, bad files fail by themselves."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import tiny_c2c, tiny_model
from peft import LoraConfig
from tokenizers_for_tests import TEXT, byte_level_tokenizer, metaspace_tokenizer
from vllm_for_tests import (
    BLOCK_SIZE,
    Engine,
    HTTPException,
    Request,
    SlidingWindowSpec,
    cache_config,
    engine_config,
    vllm_interface,
)

from c2c_hf import C2CForCausalLM, C2CProcessor, SharerCache
from c2c_hf.checkpoints.receiver_adapter import add_adapter
from c2c_hf.cli.main import main
from c2c_hf.serving.context_prompts import ContextPrompt, ContextPrompts, prefill_context
from c2c_hf.serving.slot_store import PreparedSlots, SlotSource, SlotStore

ROOT = Path(__file__).parents[2]
CONTEXTS = {
    "ships": TEXT[0],
    "france": TEXT[1],
    "beijing": TEXT[3],
    # As many tokens as "ships" on the sharer's grid, where slots have placeholder ids.
    "turned": TEXT[0].replace("The lighthouse keeper", "The keeper lighthouse"),
}
QUESTIONS = ["How many ships?", [{"role": "user", "content": "What is it?"}]]
NEW_TOKENS = 4


class Pair(NamedTuple):
    model: C2CForCausalLM
    processor: C2CProcessor
    contexts: Path


def make_pair(folder: Path, grid: str = "receiver", seed: int = 0) -> Pair:
    """A pair whose answers depend on the context, and the files of all contexts."""
    receiver, sharer = byte_level_tokenizer(), metaspace_tokenizer()
    models = tiny_model("llama", seed, len(receiver)), tiny_model("qwen3", seed + 1, len(sharer))
    model = C2CForCausalLM.from_receiver_and_sharers(*models, mode="memory", memory_grid=grid).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.fuser.parameters():
            parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    processor = C2CProcessor(receiver, sharer, mode="memory", memory_grid=grid)
    folder.mkdir(exist_ok=True)
    for name, text in CONTEXTS.items():
        prefill_context(model.sharers[0], processor, text).to_safetensors(folder / f"{name}.safetensors")
    return Pair(model, processor, folder)


@pytest.fixture(scope="module", params=["receiver", "sharer"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("contexts"), request.param)


@pytest.fixture(scope="module")
def one_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("contexts"))


@pytest.fixture(scope="module")
def vllm() -> Iterator[ModuleType]:
    with vllm_interface() as module:
        yield module


@pytest.fixture
def prompts(one_pair: Pair, tmp_path: Path) -> ContextPrompts:
    return ContextPrompts(*one_pair, SlotStore(tmp_path / "slots"))


def expected_answer(pair: Pair, question: Any, context: str) -> list[int]:
    encode = pair.processor if isinstance(question, str) else pair.processor.apply_chat_template
    inputs = encode(question, sharer_context=CONTEXTS[context])
    out = pair.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def as_request(prompt: ContextPrompt, salt: str | None = None) -> Request:
    return Request(prompt.prompt_token_ids, prompt.kv_transfer_params, salt)


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_an_engine_answers_as_generate_does(
    pair: Pair, vllm: ModuleType, tmp_path: Path, prefix_caching: bool
) -> None:
    """In one batch of unequal contexts and prompts, twice; slots need not fill whole blocks."""
    prompts = ContextPrompts(*pair, SlotStore(tmp_path))
    names = [(question, name) for question in QUESTIONS for name in CONTEXTS]
    expected = [expected_answer(pair, *name) for name in names]
    # The context matters.
    assert len({tuple(answer) for answer in expected[:4]}) >= 3
    encoded = [prompts.encode(question, context_id=name) for question, name in names]
    lengths = {len(SlotStore(tmp_path).input_ids(prompt.kv_transfer_params["c2c_slots"])) for prompt in encoded}
    assert {length % BLOCK_SIZE for length in lengths} > {0}
    engine = Engine(vllm.C2CConnector, pair.model.receiver, str(tmp_path), prefix_caching)
    free = len(engine.free)
    assert engine([as_request(prompt) for prompt in encoded], NEW_TOKENS) == expected
    # Only what follows the slots was computed.
    rest = sum(len(prompt.prompt_token_ids) for prompt in encoded)
    assert engine.num_computed < rest / 2 + len(encoded) * NEW_TOKENS
    assert engine([as_request(prompt) for prompt in reversed(encoded)], NEW_TOKENS) == expected[::-1]
    assert len(engine.free) == free - len(set(engine.hashed.values()))
    assert not engine.scheduler._requests


def test_equal_ids_of_different_contexts_never_mix(vllm: ModuleType, tmp_path: Path) -> None:
    """Slots on the sharer's grid have placeholder ids: the same prompt, whatever salt the client sends."""
    pair = make_pair(tmp_path / "contexts", "sharer")
    prompts = ContextPrompts(*pair, SlotStore(tmp_path))
    first, second = (prompts.encode(QUESTIONS[0], context_id=name) for name in ("ships", "turned"))
    assert first.prompt_token_ids == second.prompt_token_ids
    expected = [expected_answer(pair, QUESTIONS[0], name) for name in ("ships", "turned")]
    assert expected[0] != expected[1]
    engine = Engine(vllm.C2CConnector, pair.model.receiver, str(tmp_path))
    for salts in ((None, None), ("mine", "mine")):
        requests = [as_request(prompt, salt) for prompt, salt in zip((first, second), salts, strict=True)]
        assert engine(requests, NEW_TOKENS) == expected
        assert [engine([request], NEW_TOKENS) for request in map(as_request, (second, first))] == [
            [expected[1]],
            [expected[0]],
        ]


def test_plain_requests_are_left_alone(
    prompts: ContextPrompts, one_pair: Pair, vllm: ModuleType, tmp_path: Path
) -> None:
    """The same tokens without a context are computed, though slots of these tokens are in the engine's cache."""
    prompt = prompts.encode(QUESTIONS[0], context_id="ships")
    ids = torch.tensor([prompt.prompt_token_ids])
    plain = one_pair.model.receiver.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    with_context = expected_answer(one_pair, QUESTIONS[0], "ships")
    assert plain.tolist() != with_context
    engine = Engine(vllm.C2CConnector, one_pair.model.receiver, str(tmp_path / "slots"))
    for order in ((True, False), (False, True)):
        for has_context in order:
            request = as_request(prompt) if has_context else Request(prompt.prompt_token_ids)
            assert engine([request], NEW_TOKENS) == [with_context if has_context else plain.tolist()]


def test_heads_are_split_among_workers(
    prompts: ContextPrompts, one_pair: Pair, vllm: ModuleType, tmp_path: Path
) -> None:
    encoded = [prompts.encode(QUESTIONS[1], context_id=name) for name in CONTEXTS]
    engine = Engine(vllm.C2CConnector, one_pair.model.receiver, str(tmp_path / "slots"), num_workers=2)
    expected = [expected_answer(one_pair, QUESTIONS[1], name) for name in CONTEXTS]
    assert engine([as_request(prompt) for prompt in encoded], NEW_TOKENS) == expected


# ---------------------------------------------------------------------- requests that fail by themselves


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)


DAMAGES = {
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-9]),
    "no safetensors": lambda path, other: path.write_text("{}"),
    "changed": lambda path, other: flip_byte(path),
    "foreign": lambda path, other: shutil.copy(other, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_slots_fail_their_request_alone(
    prompts: ContextPrompts, one_pair: Pair, vllm: ModuleType, tmp_path: Path, damage: str
) -> None:
    bad, good = (prompts.encode(QUESTIONS[0], context_id=name) for name in ("france", "ships"))
    files = [tmp_path / "slots" / f"{prompt.kv_transfer_params['c2c_slots']}.safetensors" for prompt in (bad, good)]
    DAMAGES[damage](*files)
    expected = [None, expected_answer(one_pair, QUESTIONS[0], "ships")]
    engine = Engine(vllm.C2CConnector, one_pair.model.receiver, str(tmp_path / "slots"))
    assert engine([as_request(bad), as_request(good)], NEW_TOKENS) == expected
    # Blocks that were not filled are found by nobody.
    assert engine([as_request(bad), as_request(good)], NEW_TOKENS) == expected
    assert engine([Request(bad.prompt_token_ids)], NEW_TOKENS) != [None]


def test_requests_that_do_not_fit_fail(
    prompts: ContextPrompts, one_pair: Pair, vllm: ModuleType, tmp_path: Path
) -> None:
    good = prompts.encode(QUESTIONS[0], context_id="ships")
    key = good.kv_transfer_params
    length = len(SlotStore(tmp_path / "slots").input_ids(key["c2c_slots"]))
    bad = [
        Request(good.prompt_token_ids[1:], key),
        Request(good.prompt_token_ids[:length], key),
        Request(good.prompt_token_ids, {"c2c_slots": "../ships"}),
        Request(good.prompt_token_ids, {"c2c_slots": 3}),
        Request(good.prompt_token_ids, {"context_id": "ships"}),
        as_request(good),
    ]
    # Log-probabilities of the prompt are wanted.
    bad[-1].skip_reading_prefix_cache = True
    engine = Engine(vllm.C2CConnector, one_pair.model.receiver, str(tmp_path / "slots"))
    engine([as_request(good)], NEW_TOKENS)
    assert engine(bad, NEW_TOKENS) == [None] * len(bad)
    wrong = Engine(vllm.C2CConnector, tiny_model("qwen3", vocab_size=400), str(tmp_path / "slots"))
    assert wrong([as_request(good)], NEW_TOKENS) == [None]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("latent attention", lambda config: vars(config.model_config).update(use_mla=True)),
        ("speculative decoding", lambda config: vars(config).update(speculative_config=object())),
        ("context parallel", lambda config: vars(config.parallel_config).update(decode_context_parallel_size=2)),
        (
            "other than 'fail'",
            lambda config: vars(config.kv_transfer_config).update(kv_load_failure_policy="recompute"),
        ),
        ("must name `slots`", lambda config: config.kv_transfer_config.kv_connector_extra_config.clear()),
    ],
)
def test_unsupported_engines_are_refused(vllm: ModuleType, message: str, change: Any) -> None:
    config = engine_config("slots", {})
    change(config)
    with pytest.raises(ValueError, match=message):
        vllm.C2CConnector(config, 0, cache_config())


def test_unsupported_layers_are_refused(vllm: ModuleType) -> None:
    for caches in (cache_config(SlidingWindowSpec), cache_config(count=2)):
        with pytest.raises(ValueError, match="of several kinds, or that keep a window"):
            vllm.C2CConnector(engine_config("slots", {}), 0, caches)
    layer = SimpleNamespace(kv_sharing_target_layer_name="model.layers.0.self_attn.attn")
    worker = vllm.C2CConnector(engine_config("slots", {"model.layers.1.self_attn.attn": layer}), 1, cache_config())
    with pytest.raises(ValueError, match="share the key/value cache"):
        worker.register_kv_caches({"model.layers.1.self_attn.attn": torch.empty(0)})


# ---------------------------------------------------------------------- prompts and contexts


def test_slots_are_prepared_once(prompts: ContextPrompts, one_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each context and beginning of a prompt; the tokens are the processor's."""
    runs = []
    forward = C2CForCausalLM.forward
    monkeypatch.setattr(C2CForCausalLM, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs))
    for question in ("How many?", "Where?", "Where?"):
        path = one_pair.contexts / "ships.safetensors"
        for name in ({"context_id": "ships"}, {"context_path": str(path)}, {"context_path": path.name}):
            found = prompts.encode([{"role": "user", "content": question}], **name)
            expected = one_pair.processor.apply_chat_template(
                [{"role": "user", "content": question}], sharer_context=CONTEXTS["ships"]
            )
            assert found.prompt_token_ids == expected["input_ids"][0].tolist()
    assert len(runs) == 1
    prompts.encode([{"role": "system", "content": "Be kind."}, *QUESTIONS[1]], context_id="ships")
    prompts.encode("Where?", context_id="ships")
    assert len(runs) == 3


def test_contexts_that_cannot_be_used(prompts: ContextPrompts, one_pair: Pair, tmp_path: Path) -> None:
    contexts = tmp_path / "contexts"
    shutil.copytree(one_pair.contexts, contexts)
    prompts = ContextPrompts(one_pair.model, one_pair.processor, contexts, SlotStore(tmp_path / "slots"))
    with pytest.raises(FileNotFoundError, match="no context 'rivers'"):
        prompts.encode("Where?", context_id="rivers")
    for name in ({"context_id": "../slots/x"}, {"context_path": "/etc/passwd"}):
        with pytest.raises(ValueError, match="outside the folder"):
            prompts.encode("Where?", **name)
    with pytest.raises(ValueError, match="either `context_id` or `context_path`"):
        prompts.encode("Where?")
    path = contexts / "ships.safetensors"
    prompts.encode("Where?", context_id="ships")
    for damage in ("empty", "truncated", "no safetensors"):
        shutil.copy(one_pair.contexts / path.name, path)
        DAMAGES[damage](path, path)
        with pytest.raises(ValueError, match="damaged"):
            prompts.encode("Where?", context_id="ships")
    cache = SharerCache.from_safetensors(one_pair.contexts / path.name)
    assert cache.text == CONTEXTS["ships"]
    for text, message in ((None, "does not hold its text"), (CONTEXTS["france"], "of another text")):
        cache.text = text
        cache.to_safetensors(path)
        with pytest.raises(ValueError, match=message):
            prompts.encode("Where?", context_id="ships")
    other = tiny_model("qwen3", 7, len(one_pair.processor.sharer_tokenizers[0]))
    prefill_context(other, one_pair.processor, CONTEXTS["ships"]).to_safetensors(path)
    with pytest.raises(ValueError, match="has weights' fingerprint"):
        prompts.encode("Where?", context_id="ships")
    with pytest.raises(ValueError, match="context is empty"):
        prefill_context(other, one_pair.processor, " \n")


def test_models_that_cannot_be_served(one_pair: Pair, tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    with pytest.raises(ValueError, match="overwrites states that the engine's prefill computes"):
        ContextPrompts(tiny_c2c(), one_pair.processor, tmp_path, store)
    fields = {"mode": "memory", "token_alignment": "span"}
    with pytest.raises(ValueError, match="must have one sharer"):
        ContextPrompts(tiny_c2c("llama", ["qwen3", "gemma3"], **fields), one_pair.processor, tmp_path, store)
    other = C2CProcessor(
        one_pair.processor.tokenizer, one_pair.processor.sharer_tokenizers, mode="memory", memory_grid="sharer"
    )
    with pytest.raises(ValueError, match="from_config"):
        ContextPrompts(one_pair.model, other, tmp_path, store)
    adapted = make_pair(tmp_path / "contexts").model
    add_adapter(adapted.receiver, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no receiver adapter"):
        ContextPrompts(adapted, one_pair.processor, tmp_path, store)


@pytest.fixture
def saved(one_pair: Pair, tmp_path: Path) -> Path:
    """Folder of the receiver, the sharer and a fuser that records both."""
    one_pair.model.sharers[0].save_pretrained(tmp_path / "sharer")
    one_pair.processor.sharer_tokenizers[0].save_pretrained(tmp_path / "sharer")
    one_pair.model.receiver.save_pretrained(tmp_path / "receiver")
    one_pair.processor.tokenizer.save_pretrained(tmp_path / "receiver")
    places = str(tmp_path / "receiver"), str(tmp_path / "sharer")
    C2CForCausalLM.from_receiver_and_sharers(*places, mode="memory").save_pretrained(tmp_path / "fuser")
    C2CProcessor.from_receiver_and_sharers(*places, mode="memory").save_pretrained(tmp_path / "fuser")
    return tmp_path


def test_prefill_command(saved: Path, one_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the sharer or by the fuser that names it: the same file."""
    fuser, places = saved / "fuser", (str(saved / "receiver"), str(saved / "sharer"))
    document, output = tmp_path / "ships.txt", tmp_path / "new" / "ships.safetensors"
    document.write_text(CONTEXTS["ships"], encoding="utf-8")
    written = []
    for name in ("sharer", "fuser"):
        assert main(["prefill", str(tmp_path / name), str(document), "--output", str(output)]) == 0
        assert "tokens to" in capsys.readouterr().out
        written.append(SharerCache.from_safetensors(output))
    expected = SharerCache.from_safetensors(one_pair.contexts / "ships.safetensors")
    for cache in written:
        assert (cache.text, cache.source) == (expected.text, expected.source)
        assert all(torch.equal(*pair) for pair in zip(cache.entries(), expected.entries(), strict=True))
    C2CForCausalLM.from_receiver_and_sharers(*places).save_pretrained(fuser)
    document.write_text(" ", encoding="utf-8")
    for name, message in (("fuser", "is empty"), ("nowhere/at/all", "does not exist")):
        assert main(["prefill", str(tmp_path / name), str(document), "--output", str(output)]) == 1
        assert message in capsys.readouterr().err
    document.write_text("x", encoding="utf-8")
    assert main(["prefill", str(fuser), str(document), "--output", str(output)]) == 1
    assert "mode='memory' and one sharer" in capsys.readouterr().err


def test_serve_command(saved: Path) -> None:
    """The process becomes vLLM's server; here a module in its place prints the words that it gets."""
    module = saved / "site" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    module.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(saved / "site"), str(ROOT)])}

    command = [sys.executable, "-m", "c2c_hf", "serve", "--engine", "vllm", str(saved / "fuser"), "--slots", "kept"]
    command += ["--port", "8123", "--", "--max-model-len", "2048"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout.splitlines()[-1])
    assert words[-2:] == ["--max-model-len", "2048"]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["--model"] == str(saved / "receiver") and options["--middleware"].endswith("vllm.C2CMiddleware")
    assert (options["--dtype"], options["--host"], options["--port"]) == ("float32", "127.0.0.1", "8123")
    assert options["--served-model-name"] == "fuser"
    transfer = json.loads(options["--kv-transfer-config"])
    assert transfer["kv_connector_extra_config"] == {
        "fuser": str(saved / "fuser"),
        "contexts": "contexts",
        "slots": "kept",
    }


def test_errors_of_the_serve_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """All are said before the engine starts."""
    # Of the other tests of this file.
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    if find_spec("vllm") is None:
        assert main(["serve", "--engine", "vllm", "memory"]) == 1
        assert "vllm is not installed" in capsys.readouterr().err
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for words, message in (
        (["general"], "must have mode='memory'"),
        ([], "needs MODEL"),
        (["memory", "--max-running", "3"], "`--max-running` is no option of `--engine vllm`"),
        (["memory", "--max-batch", "3"], "`--max-batch` is no option of `--engine vllm`"),
    ):
        assert main(["serve", "--engine", "vllm", *words]) == 1
        assert message in capsys.readouterr().err
    for words, message in (
        (["--slots", "kept"], "`--slots` is no option of `--engine transformers`"),
        (["--", "--max-model-len", "2048"], "only `--engine vllm` passes words on"),
    ):
        assert main(["serve", "memory", *words]) == 1
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------- the store


def random_slots(seed: int, tokens: int = 5) -> PreparedSlots:
    generator = torch.Generator().manual_seed(seed)
    layers = [tuple(torch.randn(2, tokens, 4, generator=generator) for _ in range(2)) for _ in range(3)]
    source = SlotSource("sharer", f"text {seed}", "fuser", "receiver", "float32")
    return PreparedSlots(source, torch.arange(tokens) + seed, layers)


def test_store_returns_what_was_saved(tmp_path: Path) -> None:
    store, slots = SlotStore(tmp_path / "slots"), random_slots(1)
    assert slots.key not in store
    with pytest.raises(FileNotFoundError):
        store.load(slots.key)
    assert store.save(slots) == slots.key
    for start in (0, 3):
        loaded = SlotStore(tmp_path / "slots").load(slots.key, start)
        assert loaded.source == slots.source and torch.equal(loaded.input_ids, slots.input_ids)
        for found, saved in zip(loaded.layers, slots.layers, strict=True):
            assert all(torch.equal(a, b[:, start:]) for a, b in zip(found, saved, strict=True))
    half = random_slots(2)
    half.layers[:] = [(keys.bfloat16(), values.bfloat16()) for keys, values in half.layers]
    assert torch.equal(store.load(store.save(half)).layers[2][1], half.layers[2][1])


def test_store_removes_what_was_not_used_for_longest(tmp_path: Path) -> None:
    SlotStore(tmp_path / "one").save(random_slots(0))
    size = next((tmp_path / "one").iterdir()).stat().st_size
    store = SlotStore(tmp_path / "slots", max_bytes=3 * size + size // 2)
    keys = [store.save(random_slots(seed)) for seed in range(3)]
    assert keys[0] in store and store.load(keys[1])
    keys.append(store.save(random_slots(3)))
    assert [key in store for key in keys] == [True, True, False, True]
    with pytest.raises(ValueError, match="`max_bytes` of the slot store"):
        SlotStore(tmp_path / "slots", max_bytes=10).save(random_slots(4))
    assert len(list((tmp_path / "slots").iterdir())) == 3


# ---------------------------------------------------------------------- the middleware


@pytest.fixture
def server(one_pair: Pair, tmp_path: Path) -> SimpleNamespace:
    """The state of a server whose model and fuser are those of the pair, saved."""
    one_pair.model.receiver.save_pretrained(tmp_path / "receiver")
    one_pair.processor.tokenizer.save_pretrained(tmp_path / "receiver")
    one_pair.model.save_pretrained(tmp_path / "fuser")
    one_pair.processor.save_pretrained(tmp_path / "fuser")
    places = {"fuser": str(tmp_path / "fuser"), "contexts": str(one_pair.contexts)}
    config = engine_config(str(tmp_path / "slots"), {}, **places)
    config.model_config = SimpleNamespace(model=str(tmp_path / "receiver"), dtype=torch.float32)
    return SimpleNamespace(state=SimpleNamespace(vllm_config=config))


def send(vllm: ModuleType, server: SimpleNamespace, body: Any, path: str = "/v1/chat/completions") -> Any:
    """Send a body in two parts through the middleware; returns what the server gets."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [{"type": "http.request", "body": data[:5], "more_body": True}, {"type": "http.request", "body": data[5:]}]
    got = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            got.append(message["body"])

    async def receive() -> Any:
        return parts.pop(0)

    scope = {"type": "http", "method": "POST", "path": path, "app": server}
    asyncio.run(vllm.C2CMiddleware(app)(scope, receive, None))
    return b"".join(got) if isinstance(body, bytes) else json.loads(b"".join(got))


def test_requests_about_contexts_are_encoded(
    vllm: ModuleType, server: SimpleNamespace, prompts: ContextPrompts, one_pair: Pair, tmp_path: Path
) -> None:
    body = {"model": "m", "messages": QUESTIONS[1], "kv_transfer_params": {"context_id": "ships"}, "seed": 1}
    found = send(vllm, server, body)
    # The same slots as those of the model at hand: the fuser was saved as it is.
    expected = prompts.encode(QUESTIONS[1], context_id="ships")
    params = found.pop("kv_transfer_params")
    assert params.pop("prompt_token_ids") == expected.prompt_token_ids
    assert found == {"model": "m", "messages": QUESTIONS[1], "seed": 1}
    engine = Engine(vllm.C2CConnector, one_pair.model.receiver, str(tmp_path / "slots"))
    answer = engine([Request(expected.prompt_token_ids, params)], NEW_TOKENS)
    assert answer == [expected_answer(one_pair, QUESTIONS[1], "ships")]
    continued = {**body, "messages": [*QUESTIONS[1], {"role": "assistant", "content": "It"}]}
    continued |= {"add_generation_prompt": False, "continue_final_message": True}
    ids = send(vllm, server, continued)["kv_transfer_params"]["prompt_token_ids"]
    assert one_pair.processor.tokenizer.decode(ids).endswith("assistant\nIt")
    plain = {"prompt": QUESTIONS[0], "kv_transfer_params": {"context_path": "france.safetensors"}}
    found = send(vllm, server, plain, "/v1/completions")
    assert found["prompt"] == prompts.encode(QUESTIONS[0], context_id="france").prompt_token_ids


def test_other_requests_pass_unchanged(vllm: ModuleType, server: SimpleNamespace) -> None:
    for body in (
        {"messages": QUESTIONS[1]},
        {"messages": QUESTIONS[1], "kv_transfer_params": {"do_remote_decode": True}},
        {"messages": QUESTIONS[1], "kv_transfer_params": None},
        [1, 2, 3, 4, 5],
        b"{ no JSON",
    ):
        assert send(vllm, server, body) == body
    named = {"input": "x", "kv_transfer_params": {"context_id": "ships"}}
    assert send(vllm, server, named, "/v1/embeddings") == named


def test_errors_of_the_middleware(vllm: ModuleType, server: SimpleNamespace, one_pair: Pair) -> None:
    def refused(body: Any, path: str = "/v1/chat/completions") -> tuple[int, str]:
        with pytest.raises(HTTPException) as error:
            send(vllm, server, body, path)
        return error.value.status_code, error.value.detail

    missing = {"messages": QUESTIONS[1], "kv_transfer_params": {"context_id": "rivers"}}
    status, message = refused(missing)
    assert status == 404 and "no context 'rivers'" in message
    missing["kv_transfer_params"]["on_missing"] = "receiver"
    assert send(vllm, server, missing) == {"messages": QUESTIONS[1]}
    outside = {"messages": QUESTIONS[1], "kv_transfer_params": {"context_path": "/etc/passwd"}}
    assert refused(outside)[0] == 400
    for field, message in (
        ({"kv_transfer_params": {"context_id": "ships", "on_missing": "ignore"}}, "`on_missing` must be 'error' or"),
        ({"kv_transfer_params": {"context_id": None}}, "either `context_id` or `context_path`"),
        ({"kv_transfer_params": {"context_id": "ships"}, "use_beam_search": True}, "`use_beam_search` is not"),
    ):
        status, found = refused({"messages": QUESTIONS[1], **field})
        assert status == 400 and message in found
    several = {"prompt": ["a", "b"], "kv_transfer_params": {"context_id": "ships"}}
    status, message = refused(several, "/v1/completions")
    assert status == 400 and "must be one string" in message
    del server.state.vllm_config.kv_transfer_config.kv_connector_extra_config["fuser"]
    assert refused(missing)[0] == 500
