"""Self-supervised pretraining of XCiT: `pretrain`, `finetune`, `create_model`, `load_backbone`, and
`ssl-xcit --help`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_xcit.models.weights import load_backbone
    from ssl_xcit.models.xcit import create_model
    from ssl_xcit.runs import Run, finetune, pretrain

__all__ = ["Run", "__version__", "create_model", "finetune", "load_backbone", "pretrain"]
__version__ = "0.1.0"

_LAZY = {
    "Run": "ssl_xcit.runs",
    "create_model": "ssl_xcit.models.xcit",
    "finetune": "ssl_xcit.runs",
    "load_backbone": "ssl_xcit.models.weights",
    "pretrain": "ssl_xcit.runs",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `ssl-xcit --help` does without it.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
