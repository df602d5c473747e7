"""Code files beside a saved fuser: they find the installed package, and say how to install a missing one."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import save_tiny_model, tiny_c2c
from processes_for_tests import run_fresh
from processor_for_tests import processor
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoConfig
from transformers.dynamic_module_utils import check_imports

import c2c_hf
from c2c_hf import C2CConfig, C2CForCausalLM, C2CProcessor
from c2c_hf.checkpoints.remote_code import CODE_FILES, code_files

MISSING = "This fuser needs the package c2c_hf: install it with `pip install c2c_hf`."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fuser and its processor, saved with code, and its base models beside it."""
    receiver = save_tiny_model(tmp_path / "receiver", "llama", byte_level_tokenizer())
    sharer = save_tiny_model(tmp_path / "sharer", "qwen3", metaspace_tokenizer(), seed=1)
    sizes = {"fuser_hidden_size": 8, "fuser_intermediate_size": 8}
    model = C2CForCausalLM.from_receiver_and_sharers(receiver, sharer, **sizes)
    model.save_pretrained(tmp_path / "fuser", with_code=True)
    C2CProcessor.from_receiver_and_sharers(receiver, sharer).save_pretrained(tmp_path / "fuser", with_code=True)
    return tmp_path / "fuser"


def test_configurations_name_the_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_c2c.C2CConfig",
        "AutoModelForCausalLM": "modeling_c2c.C2CForCausalLM",
    }
    own = json.loads((folder / "processor_config.json").read_text())
    assert own["auto_map"] == {"AutoProcessor": "processing_c2c.C2CProcessor"}
    names = {path.name for path in folder.glob("*.py")}
    assert names == code_files(folder) == CODE_FILES == {f"{name}_c2c.py" for name in PARTS}


PARTS = {"configuration": "C2CConfig", "modeling": "C2CForCausalLM", "processing": "C2CProcessor"}


@pytest.mark.parametrize("part", PARTS)
def test_code_imports_the_class(folder: Path, part: str) -> None:
    path = folder / f"{part}_c2c.py"
    assert len(path.read_text().splitlines()) < 15
    assert runpy.run_path(str(path))[PARTS[part]] is getattr(c2c_hf, PARTS[part])


@pytest.mark.parametrize("part", PARTS)
def test_code_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    path = folder / f"{part}_c2c.py"
    monkeypatch.setitem(sys.modules, "c2c_hf", None)
    # Before it runs the code, transformers looks for missing packages and gives a message of its own.
    assert check_imports(path) == []
    with pytest.raises(ImportError) as error:
        runpy.run_path(str(path))
    assert str(error.value) == MISSING


def test_a_missing_dependency_of_the_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "c2c_hf.py").write_text("import a_missing_dependency\n")
    monkeypatch.delitem(sys.modules, "c2c_hf")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_missing_dependency'"):
        runpy.run_path(str(folder / "configuration_c2c.py"))


_WITH_PACKAGE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
folder = sys.argv[1]
assert "c2c_hf" not in sys.modules
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
import c2c_hf
assert type(processor) is c2c_hf.C2CProcessor
assert type(config) is type(model.config) is c2c_hf.C2CConfig
assert type(model) is c2c_hf.C2CForCausalLM
out = model.generate(**processor(["hello ships"]), max_new_tokens=3)
for with_code in (False, True):
    model.save_pretrained(f"{folder}-{with_code}", with_code=with_code)
    processor.save_pretrained(f"{folder}-{with_code}", with_code=with_code)
print(out.shape[0])
"""


def test_auto_classes_load_the_installed_package(folder: Path) -> None:
    done = run_fresh(_WITH_PACKAGE, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "1"
    assert not list(Path(f"{folder}-False").glob("*.py")), "transformers copied the package's code"
    assert {path.name for path in Path(f"{folder}-True").glob("*.py")} == CODE_FILES


_WITHOUT_PACKAGE = """
import sys
sys.modules["c2c_hf"] = None
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
for auto_class in (AutoConfig, AutoModelForCausalLM, AutoProcessor):
    try:
        auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(error)
"""


def test_auto_classes_without_the_package(folder: Path) -> None:
    done = run_fresh(_WITHOUT_PACKAGE, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [MISSING] * 3


def test_a_save_without_code_names_none(tmp_path: Path) -> None:
    tiny_c2c().save_pretrained(tmp_path, with_code=True)
    processor().save_pretrained(tmp_path, with_code=True)
    loaded = C2CForCausalLM.from_pretrained(
        tmp_path, receiver=tiny_c2c().receiver, sharers=list(tiny_c2c().sharers), verify_base_models=False
    )
    assert loaded.config.auto_map
    loaded.save_pretrained(tmp_path / "plain")
    C2CProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in (tmp_path / "plain/config.json").read_text()
    assert "auto_map" not in (tmp_path / "plain/processor_config.json").read_text()
    assert code_files(tmp_path / "plain") == set()
    assert type(AutoConfig.from_pretrained(tmp_path / "plain")) is C2CConfig


def test_a_save_over_one_with_code(folder: Path) -> None:
    tiny_c2c().save_pretrained(folder)
    assert code_files(folder) == {"processing_c2c.py"}
    processor().save_pretrained(folder)
    assert code_files(folder) == set()


def test_code_of_others_is_not_published(folder: Path) -> None:
    (folder / "mine.py").write_text("secret = 1\n")
    assert "mine.py" not in code_files(folder)
    for reference in ("other/repo--modeling.Model", "gone.Model", "../mine.Model", "mine.Model"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": reference}}))
        assert code_files(folder) == {"processing_c2c.py"}
