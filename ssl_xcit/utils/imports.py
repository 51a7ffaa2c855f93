"""Keep libraries from importing others that nobody here uses."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError
from importlib.util import find_spec
from types import ModuleType

UNUSED = ("transformers", "matplotlib", "scipy")  # seconds to import


class LeanImport(MetaPathFinder):
    """Of a library, once: while it is imported, what it would take along is not installed.
    Lightning imports torchmetrics, which imports all of `UNUSED` wherever it finds them.
    """

    def __init__(self, library: str = "torchmetrics"):
        self.library = library

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The library's own, whose code runs without the others."""
        if name != self.library:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def lean(module: ModuleType) -> None:
                with without_unused():
                    execute(module)

            spec.loader.exec_module = lean  # type: ignore[method-assign]
        return spec


@contextmanager
def without_unused() -> Iterator[None]:
    """Meanwhile these are not installed, by their metadata and for import statements."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    original, from_name = Distribution.__dict__["from_name"], Distribution.from_name

    def installed(name: str) -> Distribution:
        if name.lower() in hidden:
            raise PackageNotFoundError(name)
        return from_name(name)

    Distribution.from_name = staticmethod(installed)  # type: ignore[method-assign]
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        Distribution.from_name = original  # type: ignore[method-assign]
        for name in hidden:
            del sys.modules[name]
