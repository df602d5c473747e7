"""transformers' `ModelTesterMixin` on a tiny pair, from the source distribution of the installed release.

The distribution has `tests/test_modeling_common.py`, but not `tests/generation`: `GenerationTesterMixin` cannot be run
from it. What it checks of `generate` is in `test_generation.py`.
"""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

#: Tests of the mixin that do not apply, and why.
INAPPLICABLE: dict[str, str] = {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mixin(tmp_path: Path) -> None:
    """Every test passes, is skipped by itself, or is listed above; what is listed fails indeed."""
    archive = os.environ.get("TRANSFORMERS_SDIST")
    if archive is None:
        name = f"transformers=={version('transformers')}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        archives = list(tmp_path.glob("transformers-*.tar.gz"))
        if not archives:
            pytest.skip(f"needs {name} from a package index, or its file in TRANSFORMERS_SDIST: {done.stderr[-300:]}")
        archive = str(archives[0])
    with tarfile.open(archive) as file:
        members = [member for member in file.getmembers() if "/tests/" in member.name]
        file.extractall(tmp_path, members, filter="data")
    (folder,) = tmp_path.glob("transformers-*/tests")
    report = tmp_path / "report.xml"
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    command += ["-o", "filterwarnings=", "--timeout=600", str(TESTS / "transformers_mixin_for_tests.py")]
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "TRANSFORMERS_TESTS": str(folder), "PYTHONPATH": paths, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert report.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None}
    passed = [case for case in cases if len(case) == 0]
    assert len(passed) > 30, done.stdout[-3000:]
    assert failed == set(INAPPLICABLE), done.stdout[-6000:]
