"""Self-supervised pretraining of XCiT: `create_model`, `load_backbone`, `ssl-xcit --help`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_xcit.models.weights import load_backbone
    from ssl_xcit.models.xcit import create_model

__all__ = ["__version__", "create_model", "load_backbone"]
__version__ = "0.1.0"

_LAZY = {"create_model": "ssl_xcit.models.xcit", "load_backbone": "ssl_xcit.models.weights"}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `ssl-xcit --help` does without it.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
