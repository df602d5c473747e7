"""The fields of a training run: their checks, presets and defaults."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from c2c_hf import C2CTrainingArguments


def test_arguments_check_themselves(tmp_path: Path) -> None:
    for field, value, message in (
        ("preset", "best", r"`preset` must be one of \['default', 'paper'\], but got 'best'"),
        ("gate_noise", "normal", "`gate_noise` must be one of .*'normal'"),
        ("min_fused_fraction", 0.0, r"`min_fused_fraction` must be in \(0, 1\], but got 0.0"),
        ("guard_weight", -1.0, "`guard_weight` must be at least 0, but got -1.0"),
        ("distillation_weight", float("nan"), "`distillation_weight` must be at least 0, but got nan"),
        ("mismatched_rate", 0.0, r"`mismatched_rate` must be in \(0, 1\], but got 0.0"),
        ("max_length", 1, "`max_length` must be at least 2, but got 1"),
        ("answer_format", "word", "`answer_format` must be one of .*'word'"),
        ("question_template", "{question}", "`question_template` must contain {choices}"),
        ("dataset_num_proc", 0, "`dataset_num_proc` must be at least 1, but got 0"),
        ("remove_unused_columns", True, "`remove_unused_columns` must be False"),
    ):
        with pytest.raises(ValueError, match=message):
            C2CTrainingArguments(str(tmp_path), use_cpu=True, **{field: value})
    with pytest.raises(ValueError, match="`per_device_train_batch_size` must be at least 2, but got 1"):
        C2CTrainingArguments(str(tmp_path), use_cpu=True, guard_weight=1.0, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="`choice_weight` and `distillation_weight` do not go together"):
        C2CTrainingArguments(str(tmp_path), use_cpu=True, choice_weight=1.0, distillation_weight=1.0)
    assert C2CTrainingArguments(str(tmp_path), use_cpu=True).gate_noise == "logistic"
    paper = C2CTrainingArguments(str(tmp_path), use_cpu=True, preset="paper")
    assert (paper.gate_noise, paper.min_fused_fraction, paper.guard_weight) == ("gumbel", 1.0, 0.0)
    assert C2CTrainingArguments(str(tmp_path), use_cpu=True, preset="paper", gate_noise="none").gate_noise == "none"


def test_the_docstring_lists_all_defaults_that_differ() -> None:
    """Habit of the package: fields with other defaults than `TrainingArguments`, with both values."""
    rows = re.findall(r"^ *\| `(\w+)` \| `?(.*?)`? \| `?(.*?)`? \|", C2CTrainingArguments.__doc__, re.MULTILINE)
    listed = {name: (ast.literal_eval(here), ast.literal_eval(there)) for name, here, there in rows}
    own, others = (
        {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(arguments)
        }
        for arguments in (C2CTrainingArguments, TrainingArguments)
    )
    assert listed == {name: (own[name], value) for name, value in others.items() if own[name] != value}
