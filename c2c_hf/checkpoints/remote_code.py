"""Lets this package's code travel with what is saved, for `trust_remote_code=True` where it is not installed."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


def write_code(folder: Path, config_name: str, classes: Mapping[str, type] | None) -> None:
    """Write the code of some classes beside a saved configuration, which then names them; or make it name none.

    Args:
        folder: Where the configuration stands.
        config_name: `"config.json"` or `"processor_config.json"`.
        classes: Name of an Auto class -> ours. `None`: what an earlier save left in the configuration is taken out.
    """
    path = folder / config_name
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("auto_map", None)
    for auto_class, own_class in (classes or {}).items():
        module = Path(str(sys.modules[own_class.__module__].__file__))
        for file in (module, *map(Path, get_relative_import_files(module))):
            shutil.copyfile(file, folder / file.name)
        fields.setdefault("auto_map", {})[auto_class] = f"{module.stem}.{own_class.__name__}"
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def code_files(folder: Path) -> set[str]:
    """Name the code files in a folder that its configurations refer to, and those they import."""
    names: set[str] = set()
    for config in ("config.json", "processor_config.json"):
        if (folder / config).is_file():
            auto_map = json.loads((folder / config).read_text(encoding="utf-8")).get("auto_map") or {}
            names |= {f"{reference.split('.')[0]}.py" for reference in auto_map.values() if "--" not in reference}
    present = [folder / name for name in names if (folder / name).is_file()]
    imported = {Path(file).name for path in present for file in get_relative_import_files(path)}
    return {name for name in names | imported if (folder / name).is_file()}
