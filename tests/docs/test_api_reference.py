"""Every public name is in the API reference."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import c2c_hf
import c2c_hf.demo

API = Path(__file__).parents[2] / "docs" / "api"
DOCUMENTED = {
    name for page in API.glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
}
PUBLIC = [f"c2c_hf.{name}" for name in c2c_hf.__all__ if name != "__version__"]
PUBLIC += [f"c2c_hf.demo.{name}" for name in c2c_hf.demo.__all__ if name.islower()]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_in_the_reference(name: str) -> None:
    assert name in DOCUMENTED, f"add `::: {name}` to a page of docs/api"


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_names_of_the_reference_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert getattr(import_module(module), attribute).__doc__
