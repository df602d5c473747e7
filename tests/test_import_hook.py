"""The Auto classes know C2C as soon as transformers and c2c_hf are imported, in whatever order."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import c2c_hf
from c2c_hf._import_hook import call_when_imported

CHECK = """
import sys, c2c_hf
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert type(AutoConfig.for_model("c2c")) is c2c_hf.C2CConfig
assert AutoModelForCausalLM._model_mapping[c2c_hf.C2CConfig] is c2c_hf.C2CForCausalLM
assert PROCESSOR_MAPPING[c2c_hf.C2CConfig] is c2c_hf.C2CProcessor
print("known")
"""
ORDERS = {
    "transformers later": "import c2c_hf\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport c2c_hf",
    "a public name": "from c2c_hf import SharerCache",
    "a module": "from c2c_hf.inference.rotary import layer_rotations",
    "a library that imports transformers": "import c2c_hf\nimport peft",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_c2c(order: str, tmp_path: Path) -> None:
    """Also in a script named as the command."""
    script = tmp_path / "c2c.py"
    script.write_text(ORDERS[order] + CHECK)
    environment = {**os.environ, "PYTHONPATH": str(Path(c2c_hf.__file__).parent.parent)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.strip() == "known", done.stderr[-2000:]


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, c2c_hf; print('torch' in sys.modules, 'transformers' in sys.modules, dir(c2c_hf))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("False False") and "C2CForCausalLM" in done.stdout, done.stderr
    with pytest.raises(AttributeError, match="module 'c2c_hf' has no attribute 'C2CForCausalLm'"):
        _ = c2c_hf.C2CForCausalLm


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library, and a package one of whose modules imports it."""
    (tmp_path / "hooked_package").mkdir()
    (tmp_path / "hooked_library.py").write_text("ready = True\n")
    (tmp_path / "hooked_package" / "__init__.py").write_text("")
    (tmp_path / "hooked_package" / "light.py").write_text("")
    (tmp_path / "hooked_package" / "inner.py").write_text("import hooked_library\nvalue = 1\n")
    (tmp_path / "hooked_package" / "outer.py").write_text("from .inner import value\nresult = value + 1\n")
    (tmp_path / "hooked_package" / "broken.py").write_text("raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.startswith("hooked_")]:
        del sys.modules[name]


def test_function_is_called_once_with_the_library_ready(packages: None) -> None:
    calls: list[bool] = []
    finders = list(sys.meta_path)
    call_when_imported("hooked_library", "hooked_package", lambda: calls.append(sys.modules["hooked_library"].ready))
    import_module("hooked_package.light")
    with pytest.raises(ValueError, match="broken"):
        import_module("hooked_package.broken")
    assert calls == [] and sys.meta_path != finders
    library = import_module("hooked_library")
    assert calls == [True] and sys.meta_path == finders
    # The modules are as if nothing had waited for them.
    assert library.__loader__ is library.__spec__.loader
    assert type(library.__loader__) is type(import_module("json").__loader__)
    import_module("hooked_package.outer")
    assert calls == [True]
    call_when_imported("hooked_library", "hooked_package", lambda: calls.append(False))
    assert calls == [True, False], "at once"


def test_function_is_called_behind_the_package_s_own_imports(packages: None) -> None:
    """`inner` is half imported when the library is ready; what the function imports is complete."""
    results: list[int] = []
    call_when_imported(
        "hooked_library", "hooked_package", lambda: results.append(import_module("hooked_package.outer").result)
    )
    import_module("hooked_package.inner")
    assert results == [2]
