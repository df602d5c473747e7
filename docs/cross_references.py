"""What the API reference needs beyond mkdocstrings: links from docstrings, and parameters of configuration classes."""

import re
from typing import Any

from griffe import Class, Extension, Function, Module, Object, Parameter, ParameterKind, Parameters

#: A name in brackets and backticks that is no Markdown link yet; a `~` in front hides the modules.
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


class CrossReferences(Extension):
    """Turns [`C2CConfig.check`], as transformers writes references, into a link, and other names into code."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Rewrite all docstrings of a loaded package."""
        self._rewrite(pkg, pkg)

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        """Give a configuration the `__init__` that transformers makes of its annotated attributes."""
        if [str(base) for base in cls.bases] != ["PreTrainedConfig"]:
            return
        kind = ParameterKind.keyword_only
        fields = [attribute for attribute in cls.attributes.values() if attribute.annotation is not None]
        parameters = [Parameter(f.name, annotation=f.annotation, kind=kind, default=f.value) for f in fields]
        cls.set_member("__init__", Function("__init__", parameters=Parameters(*parameters), parent=cls))

    def _rewrite(self, package: Module, documented: Object) -> None:
        if documented.docstring is not None:
            documented.docstring.value = _REFERENCE.sub(
                lambda match: _link(package, *match.groups()), documented.docstring.value
            )
        for member in documented.members.values():
            if not member.is_alias:
                self._rewrite(package, member)


def _link(package: Module, tilde: str, name: str) -> str:
    shown = name.rsplit(".", 1)[-1] if tilde else name
    first, _, rest = name.partition(".")
    found = package.members.get(first) if first in (package.exports or ()) else None
    if found is None or (rest and (rest.startswith("_") or rest not in found.members)):
        return f"`{shown}`"
    return f"[`{shown}`][{package.name}.{name}]"
