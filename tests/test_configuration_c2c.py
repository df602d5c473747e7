"""The configuration: round trips, layer maps and every refusal."""

import json
from pathlib import Path

import pytest
from conftest import CONFIGS
from transformers import AutoConfig

from c2c_hf import C2CConfig
from c2c_hf.configuration_c2c import layer_mapping


def test_round_trip(tmp_path: Path) -> None:
    config = C2CConfig(
        receiver_name_or_path="me/receiver",
        receiver_config=CONFIGS["gemma3"],
        sharer_configs=[CONFIGS["llama"], CONFIGS["qwen3"].to_dict()],
        token_alignment=["identity", "first"],
        fuser_hidden_size=[16, 24],
        fusion_mode="sequential",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, C2CConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert type(loaded.receiver_config) is type(CONFIGS["gemma3"])
    assert loaded.receiver_config.layer_types == CONFIGS["gemma3"].layer_types
    assert loaded.get_text_config().sliding_window == 6
    assert loaded.token_alignments == ["identity", "first"]
    assert loaded.fuser_sizes(1).hidden_size == 24
    assert loaded.fuser_sizes(1).intermediate_size == 1024
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "_name_or_path" not in saved["receiver_config"]
    assert saved["model_type"] == "c2c"


def test_defaults_alone_make_a_configuration() -> None:
    config = C2CConfig()
    assert config.num_sharers == 0
    assert config.get_text_config() is config


@pytest.mark.parametrize(
    ("receiver", "sharer", "alignment", "expected"),
    [
        (5, 3, "terminal", [0, 0, 0, 1, 2]),
        (3, 5, "terminal", [2, 3, 4]),
        (3, 3, "terminal", [0, 1, 2]),
        (5, 3, "depth_normalized", [0, 1, 1, 2, 2]),
        (3, 5, "depth_normalized", [0, 2, 4]),
        (1, 4, "depth_normalized", [3]),
        (4, 1, "depth_normalized", [0, 0, 0, 0]),
    ],
)
def test_layer_mapping(receiver: int, sharer: int, alignment: str, expected: list[int]) -> None:
    assert layer_mapping(receiver, sharer, alignment) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layer_alignment": "first"},
            r"`layer_alignment` must be one of \['terminal', 'depth_normalized'\], but got",
        ),
        ({"token_alignment": "words"}, r"`token_alignment` must be one of \['identity', .*'words'"),
        ({"token_alignment": ["span", "span"]}, r"`token_alignment` must be one value, or one per sharer \(1\)"),
        ({"context_mode": "all"}, "`context_mode` must be one of"),
        ({"fusion_mode": "both"}, "`fusion_mode` must be one of"),
        ({"fuser_type": "mlp"}, "`fuser_type` must be one of"),
        ({"fuse_response": True}, "`fuse_response=True` needs a `token_alignment` that goes token by token"),
        ({"fuser_hidden_size": 0}, "`fuser_hidden_size` must be an integer of at least 1, but got 0"),
        ({"fuser_intermediate_size": 2.5}, "`fuser_intermediate_size` must be an integer of at least 1"),
        ({"num_fuser_layers": 1}, "`num_fuser_layers` must be an integer of at least 2, but got 1"),
        ({"num_fuser_layers": [3, 3]}, r"`num_fuser_layers` must be one value, or one per sharer \(1\)"),
        ({"fuser_dropout": 1.0}, r"`fuser_dropout` must be in \[0, 1\), but got 1.0"),
        ({"initial_gate_temperature": 0.0001}, "Gate temperatures must satisfy"),
        ({"receiver_config": {"vocab_size": 3}}, "needs its `model_type`"),
    ],
)
def test_unknown_values_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C2CConfig(**{"sharer_configs": [CONFIGS["llama"]], **fields})
