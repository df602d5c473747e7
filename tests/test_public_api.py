"""The package as a whole: documented names, one file for transformers' versions, no side effects of importing."""

import ast
import configparser
import inspect
import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest

import c2c_hf

PACKAGE = Path(c2c_hf.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", [name for name in c2c_hf.__all__ if name != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    documented = getattr(c2c_hf, name)
    assert inspect.getdoc(documented)
    if inspect.isclass(documented):
        for method_name, method in vars(documented).items():
            if not method_name.startswith("_") and inspect.isfunction(method):
                assert inspect.getdoc(method), f"{name}.{method_name}"


def test_one_file_names_transformers_versions() -> None:
    """In code; docstrings may tell users the older name of an argument."""
    for name, path in FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0].value.value = ""
        code = ast.unparse(tree)
        compared = "__version__" in code and re.search(
            r"transformers(\.utils)?\.__version__|is_transformers_version", code
        )
        named = re.search(r"transformers.{0,20}\b5\.\d+", code)
        assert name == "_compat.py" or not (compared or named), f"{name} names a transformers version"
    setup = (PACKAGE.parent / "setup.cfg").read_text(encoding="utf-8")
    assert len(re.findall(r"^\s+transformers.*\b5\.\d+", setup, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("name", FILES)
def test_files_say_their_purpose(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", "`")), "the first line is a sentence"


def test_importing_registers_and_patches_nothing() -> None:
    code = (
        "import torch, transformers\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, DynamicCache, GenerationMixin\n"
        "from transformers import LlamaForCausalLM, PreTrainedModel\n"
        "classes = (DynamicCache, GenerationMixin, LlamaForCausalLM, PreTrainedModel)\n"
        "import transformers.cache_utils, transformers.masking_utils, transformers.modeling_utils as modeling_utils\n"
        "import transformers.generation.utils, transformers.models.llama.modeling_llama as llama\n"
        "modules = (transformers.cache_utils, transformers.masking_utils, modeling_utils, llama)\n"
        "modules += (transformers.generation.utils, torch.nn.functional, torch.nn.Module)\n"
        "before = [dict(vars(c)) for c in (*classes, *modules)]\n"
        "import c2c_hf\n"
        "after = [dict(vars(c)) for c in (*classes, *modules)]\n"
        "for old, new in zip(before, after):\n"
        "    assert old.keys() == new.keys()\n"
        "    changed = [name for name in old if old[name] is not new[name]]\n"
        "    assert not changed, changed\n"
        "assert type(AutoConfig.for_model('c2c')) is c2c_hf.C2CConfig\n"
        "assert AutoModelForCausalLM._model_mapping[c2c_hf.C2CConfig] is c2c_hf.C2CForCausalLM\n"
        "print('clean')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.strip() == "clean", done.stderr[-2000:]


def test_version_is_that_of_the_metadata() -> None:
    setup = (PACKAGE.parent / "setup.cfg").read_text(encoding="utf-8")
    assert f"version = {c2c_hf.__version__}\n" in setup


def test_a_wheel_holds_every_file() -> None:
    """Modules are found by their folder's `__init__.py`, other files by the patterns of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
    patterns = setup["options.package_data"]["c2c_hf"].split()
    # As setuptools does: in older versions of Python, `Path.glob` finds only folders for a `**` at the end.
    matched = {PACKAGE / name for pattern in patterns for name in glob(pattern, root_dir=PACKAGE, recursive=True)}
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            found = (path.parent / "__init__.py").is_file() if path.suffix == ".py" else path in matched
            assert found, f"{path.relative_to(PACKAGE)} would be missing in a wheel"
