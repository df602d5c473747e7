"""The order between the wings of the package: what a file may import, read from its source."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "c2c_hf"

#: Wings from bottom to top; one row may import itself and the rows before it.
ROWS = (
    ("configuration_c2c", "_compat", "_files", "_import_hook"),
    ("fusers", "alignment"),
    ("inference",),
    ("checkpoints", "hub"),
    ("processing_c2c", "modeling_c2c"),
    (
        *("convert_reference", "training", "fitting", "evaluation", "analysis", "serving", "benchmarks", "demo"),
        "integrations",
    ),
    ("cli", "__main__"),
)
ROW_OF = {wing: row for row, wings in enumerate(ROWS) for wing in wings}

#: Every file but the package's own `__init__.py`, which names the public classes of all wings.
FILES = {
    path.relative_to(PACKAGE).as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


class Import(NamedTuple):
    """An import of the package's own code."""

    module: str  # dotted, without the package's name; "" for the package itself
    line: int
    in_function: bool


def wing_of(name: str) -> str:
    """The wing of a file (`"fusers/c2c.py"`) or a module (`"fusers.c2c"`)."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


def module_name(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def own_imports(file: str) -> list[Import]:
    """Every import of the package's own code in a file: at its top, under `TYPE_CHECKING` and in functions."""
    package = ["c2c_hf", *file.split("/")[:-1]]
    found = []

    def add(full_name: str, node: ast.AST, in_function: bool) -> None:
        root, _, module = full_name.partition(".")
        if root == "c2c_hf":
            found.append(Import(module, node.lineno, in_function))

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name, node, in_function)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from .inference import cache` imports a module, `from .inference.cache import C2CCache` a name.
                full_name = f"{base}.{alias.name}"
                add(full_name if is_module(full_name.partition(".")[2]) else base, node, in_function)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function)

    visit(ast.parse(FILES[file].read_text(encoding="utf-8")), False)
    return found


def test_every_file_belongs_to_a_wing() -> None:
    assert {wing_of(file) for file in FILES} <= ROW_OF.keys(), "name the new wing in `ROWS`"


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file: str) -> None:
    for found in own_imports(file):
        where = f"{file}:{found.line} imports {found.module or 'the package itself'}"
        assert found.module or wing_of(file) in ROWS[-1], f"{where}, which imports every wing"
        if found.module:
            assert ROW_OF[wing_of(found.module)] <= ROW_OF[wing_of(file)], f"{where}, which is higher"
        assert not found.in_function or wing_of(file) in ROWS[-1], f"{where} inside a function"


def edges() -> Iterator[tuple[str, str]]:
    for file in FILES:
        for found in own_imports(file):
            if found.module:
                yield module_name(file), found.module


def test_no_wing_and_no_file_imports_itself_in_a_circle() -> None:
    wings: dict[str, set[str]] = {}
    modules: dict[str, set[str]] = {}
    for importer, imported in edges():
        modules.setdefault(importer, set()).add(imported)
        if wing_of(importer) != wing_of(imported):
            wings.setdefault(wing_of(importer), set()).add(wing_of(imported))
    TopologicalSorter(wings).prepare()
    TopologicalSorter(modules).prepare()
