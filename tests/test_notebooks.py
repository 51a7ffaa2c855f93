"""The notebooks of the docs, run from the first cell to the last."""

import base64
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "features"])
def test_notebooks_run(name, tmp_path, cache):
    notebook = nbformat.read(DOCS / f"{name}.ipynb", as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    if name == "pretrain":
        assert not [o.text for o in outputs if o.get("name") == "stderr"]
        page = next(o.data["text/html"] for o in outputs if "<table>" in str(o.get("data", "")))
        assert "k-NN 20" in page
        assert "did you mean batch_size" in outputs[-1].text
