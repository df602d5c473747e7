"""Checkpoints made to do harm: none of their code runs, and nothing is written or read outside their folder."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import save_tiny_model
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoModelForCausalLM

from c2c_hf import C2CForCausalLM, C2CProcessor


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved fuser with its processor, and base models beside it."""
    receiver = save_tiny_model(tmp_path / "receiver", "llama", byte_level_tokenizer())
    sharer = save_tiny_model(tmp_path / "sharer", "qwen3", metaspace_tokenizer(), seed=1)
    sizes = {"fuser_hidden_size": 8, "fuser_intermediate_size": 8}
    C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, **sizes).save_pretrained(tmp_path / "fuser")
    C2CProcessor.from_receiver_and_sharers(receiver, sharer).save_pretrained(tmp_path / "fuser")
    return tmp_path / "fuser"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that exists as soon as some of the code has run."""
    return tmp_path / "it-ran"


def _change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _write_code(folder: Path, mark: Path, module: str, name: str) -> None:
    (folder / f"{module}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass {name}:\n    pass\n")


def _header(content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if size is None else size) + content


def test_pickles(folder: Path, mark: Path) -> None:
    bad = pickle.dumps(_Touch(mark))
    pickle.loads(bad)
    assert mark.exists(), "the pickle would do no harm"
    mark.unlink()
    (folder / "model.safetensors").write_bytes(bad)
    with pytest.raises(ValueError, match="model.safetensors is truncated or no safetensors file"):
        C2CForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "part.safetensors").write_bytes(bad)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fuser.x": "part.safetensors"}}))
    with pytest.raises(ValueError, match="part.safetensors is truncated or no safetensors file"):
        C2CForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(bad)
    with pytest.raises(OSError, match="holds no model.safetensors"):
        C2CForCausalLM.from_pretrained(folder)
    assert not mark.exists()


def test_a_base_model_that_is_a_pickle(folder: Path, mark: Path) -> None:
    receiver = folder.with_name("receiver")
    (receiver / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": _Touch(mark)}, receiver / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, OSError, RuntimeError)):
        C2CForCausalLM.from_pretrained(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        _header(b"{}", size=2**63),
        _header(b"{}", size=200_000_000),
        _header(b" " * 200_000),
        _header(b'{"fuser.a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        _header(b'{"fuser.a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}') + b"\0" * 4,
        _header(b'{"fuser.a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}') + b"\0" * 4,
        b"",
    ],
    ids=["a header beyond memory", "beyond the file", "of nothing", "no data", "overflow", "before the data", "empty"],
)
def test_headers(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is truncated or no safetensors file"):
        C2CForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["../{}", "/{}", "a/../../{}", "..\\{}", "sharer_0/../../{}"])
def test_an_index_that_leaves_its_folder(folder: Path, tmp_path: Path, shard: str) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(weights, tmp_path / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, shard.format("outside.safetensors"))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is no safetensors file in its own folder"):
        C2CForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("subfolder", ["../fuser", "a/../../fuser", "..", "..\\fuser", "{}"])
def test_a_subfolder_that_leaves_its_folder(folder: Path, subfolder: str) -> None:
    """It may come from others: from a data base of fusers, say."""
    (folder / "a").mkdir()
    subfolder = subfolder.format(folder)
    for loader in (C2CForCausalLM, C2CProcessor):
        with pytest.raises(ValueError, match="`subfolder` must be a folder inside the repository"):
            loader.from_pretrained(folder, subfolder=subfolder)


def test_code_of_a_base_model(folder: Path, mark: Path) -> None:
    receiver = folder.with_name("receiver")
    _write_code(receiver, mark, "configuration_evil", "EvilConfig")
    auto_map = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "configuration_evil.EvilConfig"}
    _change(receiver / "config.json", model_type="evil", auto_map=auto_map)
    for load in (C2CForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        C2CForCausalLM.from_receiver_and_sharers(receiver, folder.with_name("sharer"))
    assert not mark.exists()
    with pytest.raises(Exception, match="EvilConfig"):
        C2CForCausalLM.from_pretrained(folder, receiver_kwargs={"trust_remote_code": True})
    assert mark.exists(), "the user has asked for it"


@pytest.mark.parametrize("place", ["receiver", "sharer", "fuser", "fuser/sharer_0"])
def test_code_of_a_tokenizer(folder: Path, mark: Path, place: str) -> None:
    tokenizer = folder.parent / place
    _write_code(tokenizer, mark, "tokenization_evil", "EvilTokenizer")
    auto_map = {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}
    _change(tokenizer / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="EvilTokenizer")
    bases = str(folder.with_name("receiver")), str(folder.with_name("sharer"))
    outcomes = []
    for load in (
        lambda: C2CProcessor.from_pretrained(folder),
        lambda: C2CProcessor.from_receiver_and_sharers(*bases),
        lambda: C2CForCausalLM.from_receiver_and_sharers(*bases, fuser_hidden_size=8),
    ):
        try:
            load()
            outcomes.append("loaded")
        except ValueError as error:
            outcomes.append(str(error))
    assert not mark.exists()
    # The sharer's model type has a tokenizer class in transformers, which is taken in place of the code.
    assert place == "sharer" or any("trust_remote_code=True" in outcome for outcome in outcomes)


def test_code_that_a_fuser_names(folder: Path, mark: Path) -> None:
    """Installed, the package runs its own code, whatever a checkpoint says."""
    _write_code(folder, mark, "modeling_evil", "Evil")
    auto_map = {name: "modeling_evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoProcessor")}
    config = json.loads((folder / "config.json").read_text())
    nested = {**config["receiver_config"], "auto_map": auto_map}
    _change(folder / "config.json", auto_map=auto_map, receiver_config=nested)
    _change(folder / "processor_config.json", auto_map=auto_map)
    assert type(C2CForCausalLM.from_pretrained(folder)) is C2CForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is C2CForCausalLM
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)) is C2CForCausalLM
    assert type(C2CProcessor.from_pretrained(folder)) is C2CProcessor
    assert not mark.exists()


def test_a_chat_template_that_reaches_out(folder: Path, mark: Path) -> None:
    template = "{{ messages.__class__.__base__.__subclasses__() }}{{ cycler.__init__.__globals__.os.system('%s') }}"
    (folder / "sharer_0" / "chat_template.jinja").write_text(template % f"touch {mark}")
    processor = C2CProcessor.from_pretrained(folder)
    with pytest.raises(Exception, match="(?i)unsafe|undefined|access"):
        processor.apply_chat_template([{"role": "user", "content": "hello"}])
    assert not mark.exists()


def test_numbers_beyond_reason(folder: Path) -> None:
    _change(folder / "processor_config.json", num_sharers=10**12)
    with pytest.raises(ValueError, match="lacks the sharer's tokenizer folder `sharer_1`"):
        C2CProcessor.from_pretrained(folder)


def test_saving_again_writes_inside(folder: Path, tmp_path: Path) -> None:
    """What a checkpoint names itself says nothing about where its copy goes."""
    before = {path for path in tmp_path.rglob("*")}
    _change(folder / "config.json", _name_or_path="../../outside", name_or_path="/outside")
    model = C2CForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "copy")
    new = {path for path in tmp_path.rglob("*")} - before
    assert new
    assert all(tmp_path / "copy" in (path, *path.parents) for path in new)
    shutil.rmtree(tmp_path / "copy")


def test_another_vocabulary_is_refused(folder: Path) -> None:
    """In the processor's own folder, and beside a receiver whose rounded weights cannot be compared."""
    byte_level_tokenizer(vocab_size=399).save_pretrained(folder.with_name("receiver"))
    with pytest.raises(ValueError, match="`receiver`: this fuser was made for a model with vocabulary hash"):
        C2CForCausalLM.from_pretrained(folder, receiver_kwargs={"dtype": torch.float16})
    byte_level_tokenizer().save_pretrained(folder.with_name("receiver"))
    C2CForCausalLM.from_pretrained(folder, receiver_kwargs={"dtype": torch.float16})
    byte_level_tokenizer().save_pretrained(folder / "sharer_0")
    with pytest.raises(ValueError, match="the vocabulary in 'sharer_0' is not the saved one"):
        C2CProcessor.from_pretrained(folder)
