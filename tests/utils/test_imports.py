"""What is not used is not found, for as long as a library is imported that would take it along."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version

import pytest

from ssl_xcit.utils import imports
from ssl_xcit.utils.imports import lean_import, without_unused


def test_libraries_are_not_found_meanwhile(monkeypatch):
    monkeypatch.setattr(imports, "UNUSED", ("pycocotools", "torch"))  # torch is imported already
    monkeypatch.delitem(sys.modules, "pycocotools", raising=False)
    before, torch = version("pycocotools"), version("torch")
    with without_unused():
        for name in ("pycocotools", "PyCocoTools"):
            with pytest.raises(PackageNotFoundError):
                distribution(name)
        with pytest.raises(ImportError):
            import_module("pycocotools")
        assert version("torch") == torch
    assert version("pycocotools") == before
    assert import_module("pycocotools")


def test_only_while_the_library_is_imported(tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text(
        "try:\n    import colorsys\nexcept ImportError:\n    colorsys = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "UNUSED", ("colorsys",))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    finders = list(sys.meta_path)
    with lean_import("greedy"):
        assert import_module("greedy").colorsys is None
        assert import_module("colorsys")
    assert sys.meta_path == finders
    assert import_module("colorsys")
    monkeypatch.delitem(sys.modules, "greedy")
    assert import_module("greedy").colorsys is not None


LEFT_OUT = """
import sys
from pathlib import Path
from ssl_xcit.eval.commands import embed, eval, search
from ssl_xcit.models.weights import backbone_in
from ssl_xcit.models.xcit import XCiT

backbone = XCiT(16, 1, 1)
backbone_in({"model": backbone.state_dict()}, Path("file.pth"))
print(sorted({"lightning", "torchvision", "torch._dynamo", "scipy.stats"} & sys.modules.keys()))

from ssl_xcit.utils.imports import lean_import
with lean_import():
    import lightning
from torchmetrics.detection import MeanAveragePrecision
"""


def test_features_do_without_the_libraries_of_training():
    """And what training has of them is whole."""
    words = [sys.executable, "-c", LEFT_OUT]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"
