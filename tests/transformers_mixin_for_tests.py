"""The model under transformers' own `ModelTesterMixin`, run by `tests/model/test_transformers_mixin.py`.

`TRANSFORMERS_TESTS` names the folder `tests` of the source distribution of the installed release. Base models come
from two folders, where `from_pretrained` of a saved fuser finds them again.
"""

import copy
import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any

import torch
from conftest import random_ids, save_tiny_model
from tokenizers_for_tests import byte_level_tokenizer
from transformers import AutoModelForCausalLM

from c2c_hf import C2CConfig, C2CForCausalLM

TESTS = Path(os.environ["TRANSFORMERS_TESTS"])


def _import_mixin() -> type:
    """Import the mixin; what it inherits from modules that the distribution lacks is replaced by empty classes."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(TESTS)]
    sys.modules["transformers_tests"] = package
    for folder, module, mixin in (
        ("generation", "test_utils", "GenerationTesterMixin"),
        ("exporters", "test_export", "ExportTesterMixin"),
    ):
        if (TESTS / folder / f"{module}.py").is_file():
            continue
        names = f"transformers_tests.{folder}", f"transformers_tests.{folder}.{module}"
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[names[1]], mixin, type(mixin, (), {}))
    return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


FOLDER = Path(tempfile.mkdtemp())
PLACES = [
    save_tiny_model(FOLDER / name, name, byte_level_tokenizer(), seed) for seed, name in enumerate(("llama", "qwen3"))
]


class Model(C2CForCausalLM):
    """The mixin builds a model from its configuration and expects it back after `from_pretrained`, base models too."""

    def __init__(self, config: C2CConfig, receiver: Any = None, sharers: Any = None) -> None:
        if receiver is None and torch.empty(0).device.type != "meta":
            attention = {"attn_implementation": config._attn_implementation}
            receiver, *sharers = (AutoModelForCausalLM.from_pretrained(place, **attention) for place in PLACES)
        super().__init__(config, receiver, sharers)

    @property
    def vocab_size(self) -> int:
        """The mixin asks the model itself."""
        return self.config.get_text_config().vocab_size


Model.__name__ = "C2CForCausalLM"


class Tester:
    """A tiny pair, as the testers of transformers' own models."""

    __test__ = False
    batch_size, seq_length, is_training = 2, 7, True
    num_hidden_layers, num_attention_heads, hidden_size = 3, 4, 32

    def __init__(self) -> None:
        fields = {"fuser_hidden_size": 16, "fuser_intermediate_size": 16, "num_fuser_layers": 3}
        model = C2CForCausalLM.from_receiver_and_sharers(*PLACES, token_alignment="identity", **fields)
        self._config = model.config
        self.vocab_size = model.config.get_text_config().vocab_size

    def get_config(self) -> C2CConfig:
        return copy.deepcopy(self._config)

    def prepare_config_and_inputs_for_common(self) -> tuple[C2CConfig, dict[str, Any]]:
        ids = random_ids(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class C2CModelTest(_import_mixin(), unittest.TestCase):
    all_model_classes = (Model,)
    all_generative_model_classes = ()
    test_resize_embeddings = True

    def setUp(self) -> None:
        self.model_tester = Tester()

    def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        if not return_labels:
            return inputs
        # The mixin knows by a class's name whether it takes labels. The first tokens are the prompt.
        labels = inputs["input_ids"].masked_fill(torch.arange(self.model_tester.seq_length) < 4, -100)
        return {**inputs, "labels": labels}
