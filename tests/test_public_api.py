"""What the package promises as a whole: its names, who imports whom, and that importing changes nothing else."""

import ast
import inspect
import os
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import c2c_hf

PACKAGE = Path(c2c_hf.__file__).parent
FILES = {path.stem: path for path in PACKAGE.glob("*.py")}
EVALUATION = {path.stem: path for path in (PACKAGE / "evaluation").glob("*.py")}
ALL_FILES = {**FILES, **{f"evaluation/{name}": path for name, path in EVALUATION.items()}}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Our own modules of a file's folder that it imports: at its top, and inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    outer, inner = set(), set()
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] != "c2c_hf", f"{path.name} imports the package by its full name"
        elif isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "c2c_hf" for alias in node.names), path.name
        (outer if id(node) in top else inner).update(name.split(".")[0] for name in names)
    return outer, inner


def test_imports_go_down() -> None:
    graph = {}
    for name, path in FILES.items():
        if name == "__init__":
            continue
        outer, inner = imports(path)
        assert "__init__" not in outer
        if not name.startswith("cli"):
            assert not inner, f"{name} hides imports inside functions"
        graph[name] = outer & FILES.keys()
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("alignment") < order.index("processing_c2c") < order.index("compare")
    assert order.index("fuser") < order.index("fusion") < order.index("modeling_c2c") < order.index("conversion")
    assert order.index("fingerprints") < order.index("prefill") < order.index("given_states")
    assert order.index("model_card") < order.index("hub") < order.index("saving") < order.index("modeling_c2c")
    assert graph["alignment"] == graph["configuration_c2c"] == graph["_compat"] == set()
    assert not any("evaluation" in imports(path)[0] for path in FILES.values()), "the library does not need it"


def test_evaluation_imports_go_down() -> None:
    graph = {}
    for name, path in EVALUATION.items():
        outer, inner = imports(path)
        assert not inner, f"evaluation/{name} hides imports inside functions"
        graph[name] = outer
        above = [
            node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.level == 2
        ]
        assert not {"cli", "cli_evaluate", "demo", "hub", "training"} & {module.split(".")[0] for module in above}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("answering") < order.index("controls") < order.index("methods") < order.index("evaluate")
    assert graph["rows"] == graph["intervals"] == graph["records"] == set()


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
    for name, path in ALL_FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0].value.value = ""
        code = ast.unparse(tree)
        compared = "__version__" in code and re.search(
            r"transformers(\.utils)?\.__version__|is_transformers_version", code
        )
        named = re.search(r"transformers.{0,20}\b5\.\d+", code)
        assert name == "_compat" or not (compared or named), f"{name} names a transformers version"
    setup = (PACKAGE.parent / "setup.cfg").read_text(encoding="utf-8")
    assert len(re.findall(r"^\s+transformers.*\b5\.\d+", setup, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("name", ALL_FILES)
def test_files_stay_short(name: str) -> None:
    lines = len(ALL_FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 350, f"{name} has {lines} lines: it is two ideas"


@pytest.mark.parametrize("name", ALL_FILES)
def test_files_say_their_purpose(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(ALL_FILES[name].read_text(encoding="utf-8")))
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
