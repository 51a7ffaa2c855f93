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


@contextmanager
def lean_import(library: str = "torchmetrics") -> Iterator[None]:
    """Meanwhile, if this library is imported, its code finds none of `UNUSED`. Lightning imports
    torchmetrics, which imports all of them wherever it finds them.
    """
    finder = LeanFinder(library)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


class LeanFinder(MetaPathFinder):
    """Finds one library, once."""

    def __init__(self, library: str):
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
