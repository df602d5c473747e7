"""Run the notebooks, or write into them from where Colab opens them.

    python examples/notebooks/run.py quickstart look_into_a_fuser     # cells and outputs of one run on the real pair
    python examples/notebooks/run.py --repository OWNER/NAME          # badges, and install cells that name it

Cells run in order in one namespace, in a temporary folder. What they print is kept; progress bars go to the terminal.
"""

import argparse
import io
import json
import os
import re
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
COLAB = "https://colab.research.google.com/github/{repository}/blob/main/examples/notebooks/{file}"


def run(notebook: dict[str, Any]) -> None:
    """Run every cell and replace its output.

    Args:
        notebook: The notebook.
    """
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells, start=1):
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        lines = printed.getvalue().splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []


def set_repository(notebook: dict[str, Any], file: str, repository: str) -> None:
    """Put Colab's badge under the title, and let the first cell install from the repository.

    Args:
        notebook: The notebook.
        file: Its name.
        repository: `OWNER/NAME` on GitHub.
    """
    title = notebook["cells"][0]["source"]
    if title[2].startswith(BADGE):
        del title[2:4]
    title[2:2] = [f"{BADGE}({COLAB.format(repository=repository, file=file)})\n", "\n"]
    install = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    package = rf'\g<1> @ git+https://github.com/{repository}"'
    install["source"] = [re.sub(r'("c2c_hf\[[\w,-]+\])[^"]*"', package, line) for line in install["source"]]


def main() -> None:
    """Change the notebooks in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks to run, without .ipynb")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="on GitHub; written into all notebooks")
    arguments = parser.parse_args()
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if arguments.repository is not None:
            set_repository(notebook, path.name, arguments.repository)
        if path.stem in arguments.names:
            before = os.getcwd()
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                run(notebook)
                os.chdir(before)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
