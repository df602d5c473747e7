"""Sharers that run elsewhere: their caches come as files or messages, and give the same answers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, pad_rows, pair_id, random_ids, randomize_fuser, save_tiny_model, tiny_c2c, tiny_model
from processor_for_tests import CHAT, TEXTS
from safetensors.torch import load, save
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

import c2c_hf
from c2c_hf import C2CCache, C2CForCausalLM, C2CProcessor, SharerCache
from c2c_hf.inference.fingerprints import SharerSource, fingerprint, text_hash, tokenizer_hash
from c2c_hf.inference.prefill import cached_states

ROWS = [random_ids(11, seed=1), random_ids(7, seed=2), random_ids(3, seed=3)]
BATCH = {"input_ids": pad_rows(ROWS, "left"), "attention_mask": pad_rows([torch.ones_like(r) for r in ROWS], "left")}


def read(model: C2CForCausalLM, inputs: dict[str, torch.Tensor] = BATCH, **kwargs: object) -> list[SharerCache]:
    """The cache of each sharer on the receiver's own tokens, sent as a message."""
    return [
        SharerCache.from_safetensors(
            SharerCache.prefill(sharer, inputs["input_ids"], inputs["attention_mask"]).to_safetensors(**kwargs)
        )
        for sharer in model.sharers
    ]


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the rounding of a sharer that has read the last token, too, which a receiver here would not ask for."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def without_sharers(model: C2CForCausalLM) -> C2CForCausalLM:
    """The same model, whose sharers fail when they run."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a sharer was run")

    for sharer in model.sharers:
        sharer.forward = refuse
    return model


@pytest.mark.parametrize("pair", [PAIRS[2], PAIRS[4], PAIRS[7]], ids=pair_id)
def test_padded_batches_are_fused_alike(pair: tuple[str, list[str]]) -> None:
    model = tiny_c2c(*pair)
    expected = model(**BATCH).logits
    states = read(model)
    with torch.no_grad():
        found = without_sharers(model)(**BATCH, sharer_caches=states).logits
    assert_alike(found, expected)
    with model.disable_fusion():
        assert not torch.allclose(model(**BATCH).logits, expected, atol=1e-2)
        assert torch.equal(model(**BATCH, sharer_caches=states).logits, model(**BATCH).logits)


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 2, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
    ],
    ids=lambda mode: "-".join(map(str, mode)),
)
def test_generation(mode: dict[str, object]) -> None:
    model = tiny_c2c()
    inputs = BATCH if "prompt_lookup_num_tokens" not in mode else {name: BATCH[name][:1] for name in BATCH}
    (state,) = read(model, inputs)
    before = [(keys.clone(), values.clone()) for keys, values in cached_states(state.cache)]

    def generate(**kwargs: object) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=6, pad_token_id=0, **mode, **kwargs)

    expected = generate()
    without_sharers(model)
    assert torch.equal(generate(sharer_caches=state), expected)
    assert torch.equal(generate(sharer_caches=[state]), expected)
    after = cached_states(state.cache)
    assert all(
        torch.equal(a, b) for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True)
    )
    with model.disable_fusion():
        alone = generate(sharer_caches=state)
        assert torch.equal(alone, generate())
    assert not torch.equal(alone, expected)


def test_some_sharers_here_and_some_elsewhere() -> None:
    model = tiny_c2c("llama", ["qwen3", "gemma3"])
    expected = model(**BATCH).logits
    first, second = read(model)
    for states in ([first, None], [None, second], [first, second]):
        assert_alike(model(**BATCH, sharer_caches=states).logits, expected)
    with pytest.raises(ValueError, match=r"`sharer_caches` must hold one cache per sharer \(2\), but got 1"):
        model(**BATCH, sharer_caches=first)
    with pytest.raises(TypeError, match="`sharer_caches` must hold `SharerCache`, but got Tensor"):
        model(**BATCH, sharer_caches=[BATCH["input_ids"], None])


def test_a_conversation_goes_on() -> None:
    """The sharer reads each turn elsewhere; the cache keeps the state of the last one."""
    model, ids = tiny_c2c(), random_ids(1, 12)
    alignment = torch.arange(12).masked_fill(torch.arange(12) == 11, -1).unsqueeze(0)
    (whole,) = read(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    outputs = []
    for states in (None, whole):
        cache = C2CCache()
        model(input_ids=ids[:, :7], cache=cache, sharer_caches=states)
        kwargs = {"sharer_input_ids": ids, "sharer_alignment": alignment, "sharer_caches": states}
        outputs.append(model(input_ids=ids[:, 7:], cache=cache, **kwargs).logits)
    assert_alike(*outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_message_holds_what_was_read(dtype: torch.dtype, tmp_path: Path) -> None:
    sharer, tokenizer = tiny_model("gemma3").to(dtype), byte_level_tokenizer()
    state = SharerCache.prefill(sharer, **BATCH, tokenizer=tokenizer, revision="a" * 40)
    message = state.to_safetensors(tmp_path / "state.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"state.safetensors"}
    for data in (message, tmp_path / "state.safetensors", str(tmp_path / "state.safetensors")):
        found = SharerCache.from_safetensors(data)
        assert found.source == SharerSource(fingerprint(sharer), "a" * 40, tokenizer_hash(tokenizer))
        assert torch.equal(found.input_ids, BATCH["input_ids"])
        assert torch.equal(found.attention_mask, BATCH["attention_mask"])
        for old, new in zip(cached_states(state.cache), cached_states(found.cache), strict=True):
            for expected, tensor in zip(old, new, strict=True):
                assert tensor.dtype == dtype
                assert torch.equal(tensor, expected)


def test_rounded_states() -> None:
    model = tiny_c2c()
    state = SharerCache.prefill(model.sharers[0], **BATCH)
    whole, rounded = state.to_safetensors(), state.to_safetensors(int8=True)
    numbers = sum(tensor.numel() for pair in cached_states(state.cache) for tensor in pair)
    # A byte per number and a scale per head and token, in place of four bytes per number; and longer headers.
    head_dim = model.config.sharers[0].layer_shapes[0][1]
    assert 0 <= len(rounded) - (len(whole) - numbers * (3 - 4 / head_dim)) < 2000
    (found,) = read(model, int8=True)
    for old, new in zip(cached_states(state.cache), cached_states(found.cache), strict=True):
        for expected, tensor in zip(old, new, strict=True):
            largest = expected.abs().amax(-1, keepdim=True)
            assert (tensor - expected).abs().le(largest / 253).all()
            assert not torch.equal(tensor, expected)
    with torch.no_grad():
        difference = (model(**BATCH, sharer_caches=found).logits - model(**BATCH).logits).abs().max()
    assert 0 < difference < 0.2


@pytest.mark.parametrize("mode", ["fusion", "memory"])
def test_one_document_for_a_batch_of_questions(mode: str) -> None:
    """A cache of one row serves every row with the same text, and no other."""
    tokenizer = byte_level_tokenizer()
    bases = [tiny_model(name, seed, len(tokenizer)) for seed, name in enumerate(("llama", "qwen3"))]
    model = C2CForCausalLM.from_receiver_and_sharers(*bases, mode=mode, token_alignment="span").eval()
    randomize_fuser(model, 0)
    processor = C2CProcessor.from_config(model.config, tokenizer, tokenizer)
    questions, document = ["hello ships", "What is the capital of France?"], "The keeper counted ships"
    inputs = processor(questions, sharer_context=document)
    if mode == "memory":
        one = SharerCache.prefill(model.sharers[0], processor("?", sharer_context=document)["sharer_input_ids"])
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
        expected = model.generate(**inputs, **options)
        for more in ({}, {"num_beams": 2}):
            expected = model.generate(**inputs, **options, **more)
            assert torch.equal(model.generate(**inputs, **options, **more, sharer_caches=one), expected)
        assert one.input_ids.shape[0] == 1, "the caller's stays as it is"
        inputs = processor(questions, sharer_context=[document, "Paris is short"])
    else:
        one = SharerCache.prefill(model.sharers[0], inputs["sharer_input_ids"][:1])
    with pytest.raises(ValueError, match="is that of another text, or another batch"):
        model(**inputs, sharer_caches=one)


def test_other_texts_are_refused() -> None:
    model = tiny_c2c()
    (state,) = read(model)
    other = BATCH["input_ids"].clone()
    other[0, 4] += 1
    for inputs in (
        {**BATCH, "input_ids": other},
        {"input_ids": BATCH["input_ids"], "attention_mask": torch.ones_like(other)},
        {name: value[:2] for name, value in BATCH.items()},
        {name: value[:, 1:] for name, value in BATCH.items()},
        {name: value[[1, 0, 2]] for name, value in BATCH.items()},
    ):
        for run in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
            with pytest.raises(ValueError, match="`sharer_caches`: the cache of sharer 0 is that of another text"):
                run(**inputs, sharer_caches=state)
    padding = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, 50)
    model(input_ids=padding, attention_mask=BATCH["attention_mask"], sharer_caches=state)


def test_other_sharers_are_refused() -> None:
    model = tiny_c2c()
    state = SharerCache.prefill(tiny_model("qwen3", seed=9), **BATCH)
    with pytest.raises(ValueError, match="`sharer_caches`: sharer 0 of this fuser has weights' fingerprint"):
        model(**BATCH, sharer_caches=state)
    (right,) = read(model)
    for field in ("revision", "tokenizer_hash"):
        setattr(model.config.sharers[0], field, "a" * 16)
        right.source = SharerSource(**{field: "b" * 16})
        with pytest.raises(ValueError, match="sharer 0 of this fuser has .* a{16}, .* one with b{16}; prefill the"):
            model(**BATCH, sharer_caches=right)
        right.source = SharerSource(**{field: "a" * 16})
        model(**BATCH, sharer_caches=right)
    state = SharerCache.prefill(tiny_model("gemma3"), **BATCH)
    state.source = None
    with pytest.raises(
        ValueError, match=r"`sharer_caches`: the cache of sharer 0 has layers of shapes \[\[1, 16, 16\]"
    ):
        model(**BATCH, sharer_caches=state)


def test_response_fusion_needs_sharers() -> None:
    model = tiny_c2c(fuse_response=True)
    with pytest.raises(ValueError, match="`sharer_caches` must be None with `fuse_response=True`"):
        model(**BATCH, sharer_caches=read(model))


def test_damaged_messages_are_refused(tmp_path: Path) -> None:
    message = SharerCache.prefill(tiny_model("qwen3"), **BATCH).to_safetensors()
    tensors = load(message)
    header = message[8 : 8 + int.from_bytes(message[:8], "little")]
    other_text = dict(tensors, input_ids=tensors["input_ids"] + 1)
    cut = dict(tensors, **{"layers.0.keys": tensors["layers.0.keys"][:, :, 1:].contiguous()})
    metadata = {"format": "c2c_hf.SharerCache.1", "num_layers": "5", "dtype": "float32", "text_hash": "0"}
    for data, says in (
        (b"", "`data` is damaged or holds no sharer cache"),
        (message[:-1], "`data` is damaged or holds no sharer cache"),
        (save(tensors), "`data` is damaged or holds no sharer cache"),
        (message.replace(b"SharerCache.1", b"SharerCache.9"), "`data` is damaged or holds no sharer cache"),
        (message.replace(b'"dtype":"float32"', b'"dtype":"__dict_"'), "`data` is damaged or holds no sharer cache"),
        (save(cut, metadata), "`data` is damaged or holds no sharer cache .*keys of shape"),
        (save(other_text, metadata), "`data` says that its states belong to another text"),
        (save(tensors, {**metadata, "num_layers": "6"}), "`data` is damaged or holds no sharer cache"),
    ):
        assert data != message
        with pytest.raises(ValueError, match=says):
            SharerCache.from_safetensors(data)
    assert b'"dtype":"float32"' in header
    with pytest.raises(OSError, match="gone"):
        SharerCache.from_safetensors(tmp_path / "gone")


def test_hashes_of_texts() -> None:
    ids, mask = BATCH["input_ids"], BATCH["attention_mask"]
    assert text_hash(ids, mask) == text_hash(ids.masked_fill(mask == 0, 9).int(), mask.bool())
    assert text_hash(ids, mask) != text_hash(ids, torch.ones_like(mask))
    assert text_hash(ids, mask) != text_hash(ids.flip(1), mask)
    assert text_hash(ids[:1], mask[:1]) != text_hash(ids, mask)
    assert tokenizer_hash(byte_level_tokenizer()) == tokenizer_hash(byte_level_tokenizer(chat_template=None))
    assert tokenizer_hash(byte_level_tokenizer()) != tokenizer_hash(byte_level_tokenizer(vocab_size=399))


_SHARER = """
import sys
from transformers import AutoModelForCausalLM
from c2c_hf import C2CProcessor, SharerCache
from processor_for_tests import CHAT, TEXTS
sharer = AutoModelForCausalLM.from_pretrained(sys.argv[2])
processor = C2CProcessor.from_pretrained(sys.argv[1])
for name, inputs in (("texts", processor(TEXTS)), ("chat", processor.apply_chat_template(CHAT))):
    state = SharerCache.prefill(
        sharer, inputs["sharer_input_ids"], inputs["sharer_attention_mask"], processor.sharer_tokenizers[0]
    )
    state.to_safetensors(f"{sys.argv[3]}/{name}.safetensors")
"""

_RECEIVER = """
import sys, torch
from c2c_hf import C2CForCausalLM, C2CProcessor, SharerCache
from processor_for_tests import CHAT, TEXTS
model = C2CForCausalLM.from_pretrained(sys.argv[1], load_sharers=False)
assert sum(p.numel() for p in model.sharers.parameters()) == 0
assert model.to(torch.float32).sharers[0].config.model_type == "qwen3"
processor = C2CProcessor.from_pretrained(sys.argv[1])
for name, inputs in (("texts", processor(TEXTS)), ("chat", processor.apply_chat_template(CHAT))):
    state = SharerCache.from_safetensors(f"{sys.argv[3]}/{name}.safetensors")
    print(model.generate(**inputs, sharer_caches=state, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
"""


def test_two_processes(tmp_path: Path) -> None:
    """One runs the sharer and writes states; one runs receiver and fuser, and the sharer's folder is gone."""
    bases = [
        save_tiny_model(tmp_path / "receiver", "llama", byte_level_tokenizer()),
        save_tiny_model(tmp_path / "sharer", "qwen3", metaspace_tokenizer(), seed=1),
    ]
    model = C2CForCausalLM.from_receiver_and_sharers(*bases, fuser_hidden_size=12, fuser_intermediate_size=12)
    randomize_fuser(model, seed=2).save_pretrained(tmp_path / "fuser")
    processor = C2CProcessor.from_receiver_and_sharers(*bases)
    processor.save_pretrained(tmp_path / "fuser")
    expected = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
        for inputs in (processor(TEXTS), processor.apply_chat_template(CHAT))
    ]
    path = os.pathsep.join([str(Path(c2c_hf.__file__).parent.parent), str(Path(__file__).parents[1])])
    outputs = []
    for code in (_SHARER, _RECEIVER):
        command = [sys.executable, "-c", code, str(tmp_path / "fuser"), bases[1], str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout.splitlines())
        shutil.rmtree(tmp_path / "sharer", ignore_errors=True)
    assert outputs == [[], [str(ids) for ids in expected]]


def test_without_sharers_states_are_asked_for(tmp_path: Path) -> None:
    tiny_c2c().save_pretrained(tmp_path / "fuser")
    receiver = tiny_model("llama")
    model = C2CForCausalLM.from_pretrained(tmp_path / "fuser", receiver=receiver, load_sharers=False)
    with pytest.raises(ValueError, match=r"`sharer_caches` must be given, since the sharers were not loaded"):
        model(**BATCH)
    with pytest.raises(ValueError, match=r"`sharer_caches` must be given, since the sharers were not loaded"):
        model.generate(**BATCH, max_new_tokens=2)
    with model.disable_fusion():
        assert torch.equal(model(**BATCH).logits, receiver(**BATCH).logits)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy/model.safetensors").read_bytes() == (tmp_path / "fuser/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="`sharers` must be None with `load_sharers=False`"):
        C2CForCausalLM.from_pretrained(
            tmp_path / "fuser", receiver=receiver, sharers=tiny_model("qwen3"), load_sharers=False
        )


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_memory_of_a_sharer_elsewhere(name: str, tmp_path: Path) -> None:
    """The saved fuser records the rotary embedding of every sharer layer, also where there is none."""
    receiver, sharer = tiny_model("llama"), tiny_model(name, 1)
    fields = {"mode": "memory", "memory_rank": 8}
    model = C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, **fields).eval()
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(9)
    inputs = {
        "input_ids": ids,
        "sharer_input_ids": ids[:, :5],
        "sharer_alignment": torch.where((columns > 0) & (columns < 6), columns - 1, -1)[None],
    }
    with torch.no_grad():
        expected = model(**inputs, logits_to_keep=1).logits
    state = SharerCache.from_safetensors(SharerCache.prefill(sharer, inputs["sharer_input_ids"]).to_safetensors())
    model.save_pretrained(tmp_path / "fuser")
    for folder in ("fuser", "copy"):
        apart = C2CForCausalLM.from_pretrained(tmp_path / folder, receiver=receiver, load_sharers=False)
        with torch.no_grad():
            assert torch.equal(apart(**inputs, sharer_caches=state, logits_to_keep=1).logits, expected)
        apart.save_pretrained(tmp_path / "copy")
    path = tmp_path / "fuser" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for damaged, message in (
        (None, "`load_sharers=False` needs a fuser that records"),
        ({"kinds": [], "layers": [3]}, "`rotations` of a sharer in the configuration is damaged"),
    ):
        config["sharers"][0]["rotations"] = damaged
        path.write_text(json.dumps(config), encoding="utf-8")
        apart = C2CForCausalLM.from_pretrained(tmp_path / "fuser", receiver=receiver, load_sharers=False)
        with pytest.raises(ValueError, match=message):
            apart(**inputs, sharer_caches=state)
