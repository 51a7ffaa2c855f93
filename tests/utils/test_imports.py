"""What is not used is not found, for as long as asked."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version

import pytest

from ssl_xcit.utils import imports
from ssl_xcit.utils.imports import without_unused


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
