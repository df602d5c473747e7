"""The configuration: round trips, layer maps and every refusal."""

import copy
import json
from pathlib import Path

import pytest
from conftest import CONFIGS
from transformers import AutoConfig, Gemma3Config, Gemma3TextConfig

from c2c_hf import C2CConfig
from c2c_hf.configuration_c2c import SHARER_FIELDS, SharerConfig, layer_mapping


def build_config(fields: dict) -> C2CConfig:
    """Build a configuration with one sharer; fields of sharers and unknown ones come in as users give them."""
    given = dict(fields)
    own = {name: given.pop(name) for name in fields if name in SHARER_FIELDS or name == "hidden_size"}
    config = C2CConfig(**{"sharers": [SharerConfig(config=CONFIGS["llama"])], **given})
    config.override(own)
    return config


def test_round_trip(tmp_path: Path) -> None:
    config = C2CConfig(
        receiver_name_or_path="me/receiver",
        receiver_config=CONFIGS["gemma3"],
        sharers=[
            SharerConfig(config=CONFIGS["llama"], token_alignment="identity", fuser_hidden_size=16),
            {"config": CONFIGS["qwen3"].to_dict(), "token_alignment": "first", "fuser_hidden_size": 24},
        ],
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
    assert loaded.sharers[1].fuser_hidden_size == 24
    assert loaded.sharers[1].fuser_intermediate_size == 1024
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "c2c"


def test_folders_of_base_models_stay_out_of_nested_configurations(tmp_path: Path) -> None:
    receiver, sharer = copy.deepcopy(CONFIGS["llama"]), copy.deepcopy(CONFIGS["qwen3"])
    receiver.name_or_path, sharer.name_or_path = "/home/me/receiver", "/home/me/sharer"
    config = C2CConfig(receiver_config=receiver, sharers=[SharerConfig(config=sharer)])
    config.save_pretrained(tmp_path)
    assert "/home/me" not in (tmp_path / "config.json").read_text()
    assert "/home/me" not in config.to_json_string(use_diff=False)
    assert receiver.name_or_path == "/home/me/receiver", "the caller's configuration was changed"


def test_text_configuration_of_a_multimodal_receiver(tmp_path: Path) -> None:
    config = C2CConfig(receiver_config=Gemma3Config(text_config=CONFIGS["gemma3"].to_dict()))
    config.save_pretrained(tmp_path)
    for each in (config, C2CConfig.from_pretrained(tmp_path)):
        assert isinstance(each.get_text_config(), Gemma3TextConfig)
        assert each.get_text_config(decoder=True).layer_types == CONFIGS["gemma3"].layer_types


def test_defaults_alone_make_a_configuration() -> None:
    config = C2CConfig()
    assert config.num_sharers == 0
    assert config.get_text_config() is config
    sharer = SharerConfig()
    assert (sharer.fuser_hidden_size, sharer.fuser_intermediate_size) == (1024, 1024)
    assert (sharer.num_fuser_layers, sharer.fuser_dropout, sharer.token_alignment) == (3, 0.1, "span")
    assert (config.layer_alignment, config.fusion_mode, config.fuse_response) == ("terminal", "parallel", False)
    assert (config.initial_gate_temperature, config.final_gate_temperature) == (1.0, 0.001)


@pytest.mark.parametrize(
    ("receiver", "sharer", "alignment", "expected"),
    [
        (5, 3, "terminal", [0, 0, 0, 1, 2]),
        (3, 5, "terminal", [2, 3, 4]),
        (3, 3, "terminal", [0, 1, 2]),
        (1, 4, "terminal", [3]),
        (4, 1, "terminal", [0, 0, 0, 0]),
        (1, 1, "terminal", [0]),
        (5, 3, "depth_normalized", [0, 1, 1, 2, 2]),
        (3, 5, "depth_normalized", [0, 2, 4]),
        (1, 4, "depth_normalized", [3]),
        (4, 1, "depth_normalized", [0, 0, 0, 0]),
        (1, 1, "depth_normalized", [0]),
        # 2.5 and 1.5: halves go up, where Python's rounding would give 2 and 2.
        (3, 6, "depth_normalized", [0, 3, 5]),
        (3, 4, "depth_normalized", [0, 2, 3]),
    ],
)
def test_layer_mapping(receiver: int, sharer: int, alignment: str, expected: list[int]) -> None:
    assert layer_mapping(receiver, sharer, alignment) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layer_alignment": "first"},
            r"`layer_alignment` must be one of \['terminal', 'depth_normalized', 'learned'\], but got",
        ),
        ({"token_alignment": "words"}, r"`token_alignment` must be one of \['identity', .*'words'"),
        ({"token_alignment": ["span", "span"]}, r"`token_alignment` must be one value, or one per sharer \(1\)"),
        ({"mode": "all"}, "`mode` must be one of"),
        ({"fusion_mode": "both"}, "`fusion_mode` must be one of"),
        ({"fuser_type": "mlp"}, "`fuser_type` must be one of"),
        ({"fuser_type": "c2c_complex", "mode": "memory"}, r"\['fuser_type'\] need `mode='fusion'`"),
        ({"unrotate_keys": True, "mode": "memory"}, r"\['unrotate_keys'\] need `mode='fusion'`"),
        ({"fuser_type": "c2c_shared", "layer_alignment": "learned"}, "does not go with `fuser_type='c2c_shared'`"),
        ({"shared_num_layers": 0}, "`shared_num_layers` must be an integer of at least 1"),
        ({"unrotate_keys": 1}, "`unrotate_keys` must be True or False, but got 1"),
        ({"joint_keys_values": None}, "`joint_keys_values` must be True or False"),
        ({"fusion_source_layers": 0}, "`fusion_source_layers` must be an integer of at least 1"),
        ({"fusion_source_layers": 2}, "`fusion_source_layers` must be 1 without `layer_alignment='learned'`"),
        ({"fuse_response": True}, "`fuse_response=True` needs a token-by-token `token_alignment`"),
        (
            {"fuse_response": True, "token_alignment": ["span"]},
            r"`fuse_response=True` needs a token-by-token `token_alignment` .* but got \['span'\]",
        ),
        ({"fuser_hidden_size": "64"}, "`fuser_hidden_size` must be an integer of at least 1, but got '64'"),
        ({"fuser_hidden_size": [-3]}, "`fuser_hidden_size` must be an integer of at least 1, but got -3"),
        ({"fuser_hidden_size": 0}, "`fuser_hidden_size` must be an integer of at least 1, but got 0"),
        ({"fuser_intermediate_size": 2.5}, "`fuser_intermediate_size` must be an integer of at least 1"),
        ({"num_fuser_layers": 1}, "`num_fuser_layers` must be an integer of at least 2, but got 1"),
        ({"num_fuser_layers": [3, 3]}, r"`num_fuser_layers` must be one value, or one per sharer \(1\)"),
        ({"sharers": [{"hidden_size": 8}]}, r"These are no fields of `SharerConfig`: \['hidden_size'\]"),
        ({"sharers": ["llama"]}, "`sharers` must hold `SharerConfig` or dictionaries, but got 'llama'"),
        ({"hidden_size": 8}, r"These are no fields of `C2CConfig`: \['hidden_size'\]"),
        ({"fuser_dropout": 1.0}, r"`fuser_dropout` must be in \[0, 1\), but got 1.0"),
        ({"fuser_dropout": -0.1}, r"`fuser_dropout` must be in \[0, 1\), but got -0.1"),
        ({"fuser_dropout": float("nan")}, r"`fuser_dropout` must be in \[0, 1\), but got nan"),
        ({"initial_gate_temperature": 0.0001}, r"Gate temperatures must satisfy 0 < .* but got 0.001 and 0.0001"),
        ({"final_gate_temperature": 0.0}, r"Gate temperatures must satisfy 0 < .* but got 0.0 and 1.0"),
        ({"receiver_config": {"vocab_size": 3}}, "needs its `model_type`"),
    ],
)
def test_unknown_values_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(fields)


@pytest.mark.parametrize(
    "fields",
    [{"token_alignment": None}, {"initial_gate_temperature": "hot"}, {"receiver_config": 3}],
    ids=lambda fields: next(iter(fields)),
)
def test_values_of_the_wrong_kind_are_refused_by_name(fields: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=f"`{next(iter(fields))}`"):
        build_config(fields)
