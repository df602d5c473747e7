"""The types of causal language models in transformers, as receiver, as sharer and in memory mode."""

import re
from pathlib import Path

import pytest
import transformers
from architectures_for_tests import REPRESENTATIVE, ROLES, TYPES, Outcome, outcome

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
#: Per type the status in each role, as the documentation says.
DOCUMENTED = {
    row[0]: row[1:4]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if len(row := [cell.strip() for cell in line.strip("|").split("|")]) >= 5 and row[0] in TYPES
}
RELEASE = re.search(r"transformers (\S+) as receiver", PAGE.read_text(encoding="utf-8"))


def check(model_type: str, role: str) -> Outcome:
    if model_type not in TYPES:
        pytest.skip(f"this release of transformers has no {model_type}")
    found = outcome(model_type, role)
    assert found.status != "wrong", found.note
    if RELEASE is not None and RELEASE[1] == transformers.__version__:
        assert found.status == DOCUMENTED[model_type][ROLES.index(role)], found.note
    if found.status == "refused":
        # One sentence of ours, with a reason and what to do.
        assert re.fullmatch(r".+(C2C needs \(.+\)|so that .+|does not know); use .+\.", found.note)
    return found


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_representative_types(model_type: str, role: str) -> None:
    assert check(model_type, role).status != "not built"


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("model_type", sorted(set(TYPES) - set(REPRESENTATIVE)))
def test_all_types(model_type: str, role: str) -> None:
    check(model_type, role)


def test_every_type_is_documented() -> None:
    if RELEASE is None or RELEASE[1] != transformers.__version__:
        pytest.skip("the table was made with another release of transformers")
    assert sorted(DOCUMENTED) == TYPES
    exact = [sum(row[index].startswith("exact") for row in DOCUMENTED.values()) for index in range(len(ROLES))]
    assert min(exact) >= 128
    assert not any("wrong" in row for row in DOCUMENTED.values())
