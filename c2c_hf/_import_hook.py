"""A function called when a library is imported, so that `import c2c_hf` need not import it itself."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def call_when_imported(library: str, package: str, function: Callable[[], None]) -> None:
    """Call a function once, as soon as a library is imported and no module of a package is being imported.

    Where the library is imported already, the function is called at once. Else a finder in front of `sys.meta_path`
    waits for it and removes itself before the call.

    Args:
        library: Name of the library's top package.
        package: Name of the package. While one of its modules runs its own imports, the function could not import
            that module, hence it is called behind the outermost of them.
        function: The function.
    """
    if library in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _WaitingFinder(library, package, function))


class _WaitingFinder(MetaPathFinder):
    """Finds modules as the other finders do, and counts those of the library and the package that are under way."""

    def __init__(self, library: str, package: str, function: Callable[[], None]) -> None:
        self.library, self.package, self.function = library, package, function
        self.num_importing = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.library and not fullname.startswith(f"{self.package}."):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CountingLoader(spec.loader, self)
                return spec
        return None

    def finish(self) -> None:
        if self.num_importing == 0 and self.library in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            self.function()


class _CountingLoader(Loader):
    """Another loader, which the module gets back before it is executed."""

    def __init__(self, loader: Loader, finder: _WaitingFinder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> object:
        # Loaders have optional methods, such as `get_code` for `python -m`.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.num_importing += 1
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.num_importing -= 1
        self._finder.finish()
