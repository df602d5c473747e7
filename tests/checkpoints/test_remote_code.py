"""Code that travels with a fuser: complete, of core dependencies alone, and gone when it is not asked for."""

import configparser
import json
import sys
from pathlib import Path

import pytest
from conftest import tiny_c2c
from processor_for_tests import processor
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import c2c_hf
from c2c_hf import C2CConfig, C2CForCausalLM, C2CProcessor
from c2c_hf.checkpoints.remote_code import code_files

PACKAGE = Path(c2c_hf.__file__).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_c2c().save_pretrained(tmp_path, with_code=True)
    processor().save_pretrained(tmp_path, with_code=True)
    return tmp_path


def test_the_code_is_complete(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_c2c.C2CConfig",
        "AutoModelForCausalLM": "modeling_c2c.C2CForCausalLM",
    }
    own = json.loads((folder / "processor_config.json").read_text())
    assert own["auto_map"] == {"AutoProcessor": "processing_c2c.C2CProcessor"}
    names = {path.name for path in folder.glob("*.py")}
    assert names == code_files(folder)
    for name in names:
        assert (folder / name).read_bytes() == (PACKAGE / name).read_bytes()
        assert {f"{module}.py" for module in get_relative_imports(folder / name)} <= names


def test_the_code_needs_core_dependencies_alone(folder: Path) -> None:
    """transformers refuses code that imports what is not installed, wherever in it the import stands."""
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    required = setup["options"]["install_requires"].replace("-", "_").split()
    core = {name.split(">")[0] for name in required} | {"typing_extensions"}
    imported = {name for path in folder.glob("*.py") for name in get_imports(path)}
    assert "transformers" in imported
    assert imported - set(sys.stdlib_module_names) <= core


def test_a_save_without_code_names_none(folder: Path, tmp_path: Path) -> None:
    loaded = C2CForCausalLM.from_pretrained(
        folder, receiver=tiny_c2c().receiver, sharers=list(tiny_c2c().sharers), verify_base_models=False
    )
    assert loaded.config.auto_map
    loaded.save_pretrained(tmp_path / "plain")
    C2CProcessor.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in (tmp_path / "plain/config.json").read_text()
    assert "auto_map" not in (tmp_path / "plain/processor_config.json").read_text()
    assert code_files(tmp_path / "plain") == set()
    assert type(AutoConfig.from_pretrained(tmp_path / "plain")) is C2CConfig


def test_code_of_others_is_not_published(folder: Path) -> None:
    (folder / "mine.py").write_text("secret = 1\n")
    assert "mine.py" not in code_files(folder)
    for reference in ("other/repo--modeling.Model", "gone.Model", "../mine.Model"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": reference}}))
        assert {"mine.py", "modeling.py", "gone.py"}.isdisjoint(code_files(folder))
