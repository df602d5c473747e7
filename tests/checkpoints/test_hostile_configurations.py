"""A foreign configuration allocates nothing that its weights do not hold, and each wrong field is one `ValueError`."""

import json
from pathlib import Path

import pytest
from training_for_tests import make_model, make_processor

from c2c_hf import C2CForCausalLM, C2CProcessor

WRONG = [None, "x", -1, 10**12, 1.5, [], {}, [[1]], True]


@pytest.fixture(params=["fusion", "memory"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, C2CForCausalLM]:
    model, own = make_model(mode=request.param), make_processor()
    model.save_pretrained(tmp_path)
    C2CProcessor(own.tokenizer, own.sharer_tokenizers, "span", mode=request.param).save_pretrained(tmp_path)
    return tmp_path, model


def test_wrong_fields(saved: tuple[Path, C2CForCausalLM]) -> None:
    folder, model = saved
    config = json.loads((folder / "config.json").read_text())

    def load(fields: dict) -> None:
        (folder / "config.json").write_text(json.dumps(fields))
        C2CForCausalLM.from_pretrained(folder, receiver=model.receiver, sharers=list(model.sharers))

    own = [
        name for name in config if name.startswith(("receiver", "memory", "fus", "layer", "mode", "sharers", "dtype"))
    ]
    changed = [{**config, name: value} for name in own for value in WRONG]
    (sharer,) = config["sharers"]
    changed += [{**config, "sharers": [{**sharer, name: value}]} for name in sharer for value in WRONG]
    refused = 0
    for fields in changed:
        try:
            load(fields)
        except ValueError as error:
            assert str(error)
            refused += 1
    assert refused > len(changed) // 2


def test_wrong_fields_of_a_processor(saved: tuple[Path, C2CForCausalLM]) -> None:
    folder, _ = saved
    config = json.loads((folder / "processor_config.json").read_text())
    refused = 0
    for fields in [{**config, name: value} for name in config for value in WRONG] + [[], None, "x", 3]:
        (folder / "processor_config.json").write_text(json.dumps(fields))
        try:
            C2CProcessor.from_pretrained(folder)("hi")
        except ValueError as error:
            assert str(error)
            refused += 1
    assert refused > 30


def test_sizes_beyond_the_weights(saved: tuple[Path, C2CForCausalLM]) -> None:
    folder, model = saved
    names = ["fuser_hidden_size", "fuser_intermediate_size", "num_fuser_layers"]
    if model.config.mode == "memory":
        names = ["memory_rank", "memory_hidden_size"]
    for name in names:
        for value in (10**6, 10**15):
            with pytest.raises(ValueError, match=f"`{name}` is {value}, more than the saved weights hold"):
                C2CForCausalLM.from_pretrained(
                    folder, receiver=model.receiver, sharers=list(model.sharers), **{name: value}
                )
