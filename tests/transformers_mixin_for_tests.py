"""The model under transformers' own `ModelTesterMixin`, run by `tests/model/test_transformers_mixin.py`.

`TRANSFORMERS_TESTS` names the folder `tests` of the source distribution of the installed release.
"""

import copy
import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

from conftest import random_ids, tiny_c2c

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


class Tester:
    """A tiny pair, as the testers of transformers' own models."""

    batch_size, seq_length, is_training = 2, 7, True
    num_hidden_layers, num_attention_heads, hidden_size, vocab_size = 3, 4, 32, 96

    def __init__(self) -> None:
        self._config = tiny_c2c("llama", ["qwen3"]).config

    def get_config(self) -> C2CConfig:
        return copy.deepcopy(self._config)

    def prepare_config_and_inputs_for_common(self) -> tuple[C2CConfig, dict[str, Any]]:
        ids = random_ids(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class C2CModelTest(_import_mixin(), unittest.TestCase):
    all_model_classes = (C2CForCausalLM,)
    all_generative_model_classes = ()
    test_resize_embeddings = True

    def setUp(self) -> None:
        self.model_tester = Tester()
