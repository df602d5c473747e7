"""Published reference checkpoints: what is read, what is refused, and that reading runs no code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_ids, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from c2c_hf import C2CForCausalLM, convert_reference_checkpoint
from c2c_hf.conversion import _their_name

PARITY = Path(__file__).parent / "data" / "parity"
CHECKPOINTS = PARITY / "checkpoints"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy to spoil; its configuration names models two folders up."""
    shutil.copytree(PARITY / "models", tmp_path / "models")
    shutil.copytree(CHECKPOINTS / "qwen3_from_llama", tmp_path / "checkpoints" / "one")
    return tmp_path / "checkpoints" / "one"


def test_every_weight_is_where_it_belongs() -> None:
    """Against the copy of the same tensors without pickle; the models are those that the configuration names."""
    model = convert_reference_checkpoint(CHECKPOINTS / "qwen3_from_qwen3b")
    expected = load_file(CHECKPOINTS / "qwen3_from_qwen3b" / "projectors.safetensors")
    fuser = model.fuser[0]
    compared = 0
    for layer_idx in range(fuser.num_layers):
        for kind, entry in (("key", layer_idx), ("value", fuser.num_layers + layer_idx)):
            group, row = fuser.locate(entry)
            for name, parameter in group.named_parameters():
                assert torch.equal(parameter[row], expected.pop(f"projector_{layer_idx}.{_their_name(kind, name)}"))
                compared += 1
        assert torch.equal(fuser.gate_temperature, expected.pop(f"projector_{layer_idx}.gate_temperature"))
    assert compared > 100
    assert not expected
    assert model.config.receiver_name_or_path == str((PARITY / "models" / "qwen3-tiny").resolve())
    assert not model.training


def test_bfloat16_becomes_float32() -> None:
    exact = convert_reference_checkpoint(CHECKPOINTS / "qwen3_from_llama")
    rounded = convert_reference_checkpoint(CHECKPOINTS / "qwen3_from_llama_bf16")
    for parameter, reference in zip(rounded.fuser.parameters(), exact.fuser.parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, reference.bfloat16().float())


def test_fusers_of_different_sizes_are_saved_and_loaded(tmp_path: Path) -> None:
    model = convert_reference_checkpoint([CHECKPOINTS / "qwen3_from_llama", CHECKPOINTS / "qwen3_from_qwen3b"])
    assert model.config.fuser_hidden_size == [24, 20]
    model.save_pretrained(tmp_path)
    loaded = C2CForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(1, 12)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_files_beside_the_configuration(checkpoint: Path) -> None:
    for path in (checkpoint / "final").iterdir():
        path.rename(checkpoint / path.name)
    (checkpoint / "final").rmdir()
    assert convert_reference_checkpoint(str(checkpoint)).fuser[0].is_open()


def _edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _edit_weights(path: Path, change) -> None:
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


SPOILS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json is missing or no JSON file"),
    "no map": (
        lambda f: (f / "final/projector_config.json").write_text("{}"),
        "holds no layer map for a receiver of 4",
    ),
    "map": (
        lambda f: _edit(f / "final/projector_config.json", lambda c: c["0"]["1"].update({"3": [[0, 3]]})),
        r"the layer map \[0, 0, 1, 0\] of .* is not the one of `layer_alignment`",
    ),
    "class": (
        lambda f: _edit(f / "final/projector_0.json", lambda c: c.update({"class": "Other"})),
        "describes a 'Other', but only 'C2CProjector' can be read",
    ),
    "arguments": (
        lambda f: _edit(f / "final/projector_0.json", lambda c: c["init_args"].pop("dropout")),
        "lacks 'dropout' among its `init_args`",
    ),
    "missing": (lambda f: (f / "final/projector_2.pt").unlink(), "projector_2.pt is missing, damaged"),
    "damaged": (
        lambda f: (f / "final/projector_1.pt").write_bytes((f / "final/projector_1.pt").read_bytes()[:1000]),
        "projector_1.pt is missing, damaged or holds more than weights",
    ),
    "unknown": (
        lambda f: _edit_weights(f / "final/projector_1.pt", lambda w: w.update(extra=torch.zeros(1))),
        r"holds unknown weights: \['extra'\]",
    ),
    "lacks": (
        lambda f: _edit_weights(f / "final/projector_1.pt", lambda w: w.pop("key_in.bias")),
        "lacks the weight key_in.bias",
    ),
    "sizes": (
        lambda f: _edit(f / "final/projector_0.json", lambda c: c["init_args"].update(hidden_dim=10)),
        r"has shape \(24, 68\), but receiver and sharer ask for \(10, 68\)",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_spoilt_checkpoints_are_refused(checkpoint: Path, name: str) -> None:
    spoil, message = SPOILS[name]
    spoil(checkpoint)
    with pytest.raises(ValueError, match=message):
        convert_reference_checkpoint(checkpoint)


def test_wrong_models_are_refused() -> None:
    with pytest.raises(ValueError, match="`checkpoint_dirs` must name at least one folder"):
        convert_reference_checkpoint([])
    with pytest.raises(ValueError, match=r"`sharers` must be as many as `checkpoint_dirs` \(1\), but got 2"):
        convert_reference_checkpoint(CHECKPOINTS / "qwen3_from_llama", sharers=[tiny_model("llama")] * 2)
    other = AutoModelForCausalLM.from_pretrained(PARITY / "models" / "qwen3-tiny-b")
    with pytest.raises(ValueError, match="holds no layer map for a receiver of 6 layers"):
        convert_reference_checkpoint(CHECKPOINTS / "qwen3_from_llama", receiver=other)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "final" / "projector_0.pt").write_bytes(pickle.dumps({"key_in.weight": Evil(tmp_path / "ran")}))
    with pytest.raises(ValueError, match="missing, damaged or holds more than weights"):
        convert_reference_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()
