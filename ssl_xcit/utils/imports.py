"""Keep libraries from importing others that nobody here uses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError

UNUSED = ("transformers", "matplotlib")  # torchmetrics' text metrics and plots; seconds to import


@contextmanager
def without_unused() -> Iterator[None]:
    """Meanwhile these are not installed, by their metadata and for import statements: Lightning
    imports torchmetrics, which imports both wherever it finds them.
    """
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
