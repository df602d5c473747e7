"""Published reference checkpoints: what is read, what is refused, and that reading runs no code."""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_ids, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from c2c_hf import C2CForCausalLM, convert_reference_checkpoint
from c2c_hf.convert_reference import _published_name

PARITY = Path(__file__).parents[1] / "data" / "parity"
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
                assert torch.equal(
                    parameter[row], expected.pop(f"projector_{layer_idx}.{_published_name(kind, name)}")
                )
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
    assert [sharer.fuser_hidden_size for sharer in model.config.sharers] == [24, 20]
    model.save_pretrained(tmp_path)
    loaded = C2CForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(1, 12)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_alignment_of_the_recipe(checkpoint: Path) -> None:
    """The recipe's alignment holds unless the caller says another; `first` and `longest` need tokenizers."""
    _edit(checkpoint / "config.json", lambda c: c["model"].update(is_do_alignment=True, alignment_strategy="longest"))
    with pytest.raises(ValueError, match="`token_alignment='longest'` needs both tokenizers"):
        convert_reference_checkpoint(checkpoint)
    assert convert_reference_checkpoint(checkpoint, token_alignment="span").config.token_alignments == ["span"]
    _edit(checkpoint / "config.json", lambda c: c["model"].update(alignment_strategy="words"))
    with pytest.raises(ValueError, match="`token_alignment` must be one of .* but got 'words'"):
        convert_reference_checkpoint(checkpoint, receiver=tiny_model("llama"), sharers=tiny_model("qwen3"))


def test_models_are_named_relative_to_the_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the process stands."""
    monkeypatch.chdir("/")
    model = convert_reference_checkpoint(checkpoint)
    models = checkpoint.parent.parent / "models"
    assert model.config.receiver_name_or_path == str((models / "qwen3-tiny").resolve())
    assert [sharer.name_or_path for sharer in model.config.sharers] == [str((models / "llama-tiny").resolve())]


def test_files_beside_the_configuration(checkpoint: Path) -> None:
    for path in (checkpoint / "final").iterdir():
        path.rename(checkpoint / path.name)
    (checkpoint / "final").rmdir()
    assert convert_reference_checkpoint(str(checkpoint)).fuser[0].parts(1, torch.float32)


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
    "no receiver": (
        lambda f: _edit(f / "config.json", lambda c: c["model"].pop("base_model")),
        "config.json names no `base_model`; pass the model",
    ),
    "no sharer": (
        lambda f: _edit(f / "config.json", lambda c: c["model"].update(teacher_model=3)),
        "config.json names no `teacher_model`; pass the model",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object, but holds list"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is missing or no JSON file"),
    "model is null": (lambda f: _edit(f / "config.json", lambda c: c.update(model=None)), "config.json"),
    "arguments are null": (
        lambda f: _edit(f / "final/projector_0.json", lambda c: c.update(init_args=None)),
        "projector_0.json",
    ),
    "map names a file": (
        lambda f: _edit(f / "final/projector_config.json", lambda c: c["0"]["1"].update({"3": [[2, "../x"]]})),
        "holds no layer mapping for a receiver of 4",
    ),
    "map is too long": (
        lambda f: _edit(f / "final/projector_config.json", lambda c: c["0"]["1"].update({"9": [[2, 0]]})),
        "is not the one of `layer_alignment` for 4 receiver and 3 sharer layers",
    ),
    "map of two": (
        lambda f: _edit(f / "final/projector_config.json", lambda c: c["0"]["1"].update({"3": [[2, 3], [1, 3]]})),
        "holds no layer mapping .*several sharer layers for one receiver layer",
    ),
    "no map": (
        lambda f: (f / "final/projector_config.json").write_text("{}"),
        "holds no layer mapping for a receiver of 4",
    ),
    "map": (
        lambda f: _edit(f / "final/projector_config.json", lambda c: c["0"]["1"].update({"3": [[0, 3]]})),
        r"the layer mapping \[0, 0, 1, 0\] of .* is not the one of `layer_alignment`",
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
    "empty": (lambda f: (f / "final/projector_1.pt").write_bytes(b""), "projector_1.pt is missing, damaged"),
    "a list of weights": (lambda f: torch.save([torch.zeros(1)], f / "final/projector_1.pt"), "projector_1.pt"),
    "one weight": (lambda f: torch.save(torch.zeros(1), f / "final/projector_1.pt"), "projector_1.pt"),
    "a number for a weight": (
        lambda f: _edit_weights(f / "final/projector_1.pt", lambda w: w.update({"key_in.weight": 3})),
        "key_in.weight in .*projector_1.pt",
    ),
    "several temperatures": (
        lambda f: _edit_weights(f / "final/projector_1.pt", lambda w: w.update(gate_temperature=torch.ones(3))),
        "gate_temperature",
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
        r"has shape \(24, 68\), but receiver and sharer need \(10, 68\)",
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
    with pytest.raises(ValueError, match="holds no layer mapping for a receiver of 6 layers"):
        convert_reference_checkpoint(CHECKPOINTS / "qwen3_from_llama", receiver=other)


def test_models_of_other_shapes_are_refused() -> None:
    receiver, sharer = (
        AutoModelForCausalLM.from_pretrained(PARITY / "models" / name) for name in ("qwen3-tiny", "llama-tiny")
    )
    with pytest.raises(ValueError, match="is not the one of `layer_alignment` for 3 receiver and 4 sharer layers"):
        convert_reference_checkpoint(CHECKPOINTS / "qwen3_from_llama", receiver=sharer, sharers=receiver)
    with pytest.raises(ValueError, match=r"key_in.weight in .* has shape \(24, 68\), but receiver and sharer need"):
        convert_reference_checkpoint(
            CHECKPOINTS / "qwen3_from_llama", receiver=receiver, sharers=tiny_model("llama"), token_alignment="span"
        )


def test_damaged_bytes_are_refused(checkpoint: Path) -> None:
    """Whatever stands in the file: a sentence, never another error."""
    path, generator = checkpoint / "final" / "projector_1.pt", random.Random(0)
    models = [AutoModelForCausalLM.from_pretrained(PARITY / "models" / name) for name in ("qwen3-tiny", "llama-tiny")]
    whole = path.read_bytes()
    damaged = [whole[: generator.randrange(len(whole))] for _ in range(8)]
    damaged += [generator.randbytes(200) for _ in range(8)] + [
        b"\x80\x02" + generator.randbytes(60) for _ in range(24)
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="projector_1.pt is missing, damaged or holds more than weights"):
            convert_reference_checkpoint(checkpoint, *models)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["bare", "zipped"])
def test_a_pickle_with_code_does_not_run(write, checkpoint: Path, tmp_path: Path) -> None:
    with (checkpoint / "final" / "projector_0.pt").open("wb") as file:
        write({"key_in.weight": Evil(tmp_path / "ran")}, file)
    with pytest.raises(ValueError, match="missing, damaged or holds more than weights"):
        convert_reference_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "the pickle is harmless, so nothing was tested"
