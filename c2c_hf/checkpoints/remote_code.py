"""Short code files beside a saved fuser, by which `trust_remote_code=True` finds the classes of this package."""

import json
from pathlib import Path

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

#: Saved configuration -> Auto class -> the code file and its class, as `auto_map` names them.
AUTO_MAPS = {
    CONFIG_NAME: {
        "AutoConfig": "configuration_c2c.C2CConfig",
        "AutoModelForCausalLM": "modeling_c2c.C2CForCausalLM",
    },
    PROCESSOR_NAME: {"AutoProcessor": "processing_c2c.C2CProcessor"},
}
#: The names of all code files.
CODE_FILES = {f"{reference.split('.')[0]}.py" for auto_map in AUTO_MAPS.values() for reference in auto_map.values()}

# transformers refuses code that imports a missing package with a message of its own, unless a `try` surrounds it.
_TEMPLATE = '''"""`{name}` of the package c2c_hf, for `trust_remote_code=True`."""

try:
    from c2c_hf import {name}
except ModuleNotFoundError as error:
    if error.name != "c2c_hf":
        raise
    raise ImportError("This fuser needs the package c2c_hf: install it with `pip install c2c_hf`.") from error

__all__ = ["{name}"]
'''


def write_code(folder: Path, config_name: str, with_code: bool) -> None:
    """Write the code files that belong to a saved configuration and name them in it; or make it name none.

    Args:
        folder: Where the configuration is saved.
        config_name: `"config.json"` or `"processor_config.json"`.
        with_code: Whether to write them. `False`: what an earlier save left in the configuration is removed.
    """
    path = folder / config_name
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("auto_map", None)
    if with_code:
        fields["auto_map"] = AUTO_MAPS[config_name]
        for reference in AUTO_MAPS[config_name].values():
            module, name = reference.split(".")
            (folder / f"{module}.py").write_text(_TEMPLATE.format(name=name), encoding="utf-8")
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def code_files(folder: Path) -> set[str]:
    """Return the names of the code files in a folder that its configurations refer to."""
    names = set()
    for config_name, auto_map in AUTO_MAPS.items():
        path = folder / config_name
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("auto_map") == auto_map:
            names |= {f"{reference.split('.')[0]}.py" for reference in auto_map.values()}
    return {name for name in names if (folder / name).is_file()}
