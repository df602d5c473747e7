"""transformers' `ModelTesterMixin` on a tiny pair, from the source distribution of the installed release.

    pip download transformers==5.24.0 --no-binary transformers --no-deps && pip install parameterized
    TRANSFORMERS_SDIST=transformers-5.24.0.tar.gz python -m pytest -m slow tests/model/test_transformers_mixin.py

The distribution has `tests/test_modeling_common.py`, but not `tests/generation`: what `GenerationTesterMixin` checks
is in `test_generation.py`.
"""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

_TAIL = "only the tokens behind the fused region are computed in the last forward pass, so that outputs are theirs"
_BASE_CONFIGS = (
    "the configurations of base models are records; `set_attn_implementation` and the argument reach the models"
)
_CHECKPOINTING = "checkpointed layers of a frozen base model would drop its cache: the fusers' are checkpointed alone"
#: Tests of the mixin that do not apply, and why.
INAPPLICABLE = {
    "test_attention_outputs": _TAIL,
    "test_hidden_states_output": _TAIL,
    "test_bc_cache_name_forward": "both names of the cache are taken, without a warning",
    "test_config_attn_implementation_setter": (
        "the configurations of base models are records; `set_attn_implementation` and the argument reach the models"
    ),
    "test_gradient_checkpointing_enable_disable": _CHECKPOINTING,
    "test_peft_gradient_checkpointing_enable_disable": _CHECKPOINTING,
    "test_training_gradient_checkpointing": _CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_false": _CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_true": _CHECKPOINTING,
    "test_init_weights_can_init_buffers": "buffers are those of base models, which initialize themselves",
    "test_inputs_embeds": "sharers prefill tokens: `inputs_embeds` alone are refused",
    "test_model_weights_reload_no_missing_tied_weights": "a file without the fuser's weights is refused",
    "test_num_layers_is_small": "the tests' base models have three and five layers",
    "test_retain_grad_hidden_states_attentions": (
        "`_from_config` sets the attention of base models that it makes; here they come from folders"
    ),
    "test_tied_weights_keys": "base models tie their embeddings as their own configurations say",
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mixin(tmp_path: Path) -> None:
    """Every test passes, is skipped by itself, or is listed above; what is listed fails indeed."""
    pytest.importorskip("parameterized", reason="transformers' tests import `parameterized`")
    archive = os.environ.get("TRANSFORMERS_SDIST")
    if archive is None:
        pytest.skip("TRANSFORMERS_SDIST must name the source distribution of the installed transformers")
    with tarfile.open(archive) as file:
        members = [member for member in file.getmembers() if "/tests/" in member.name]
        file.extractall(tmp_path, members, filter="data")
    (folder,) = tmp_path.glob("transformers-*/tests")
    report = tmp_path / "report.xml"
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    command += ["-o", "filterwarnings=", "-o", "addopts=", str(TESTS / "transformers_mixin_for_tests.py")]
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "TRANSFORMERS_TESTS": str(folder), "PYTHONPATH": paths, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert report.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        case.attrib["name"].split(" [")[0].split("[")[0]
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    }
    assert len([case for case in cases if len(case) == 0]) > 80, done.stdout[-3000:]
    assert failed == set(INAPPLICABLE), done.stdout[-6000:]
