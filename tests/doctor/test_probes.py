"""Libraries that work, and ones that do not: as packages of their name in front of the others."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from ssl_xcit import cli
from ssl_xcit.doctor import checks, probes
from ssl_xcit.models import kernel_trial
from ssl_xcit.models.kernels import cache_folder, kernels
from ssl_xcit.utils.hardware import cpp_compiler


def test_faiss_here_searches_rightly():
    facts = probes.ask("faiss")
    assert facts["right"], facts


def test_images_here_are_decoded():
    facts = probes.ask("decoders")
    assert set(facts["by_pillow"].values()) == {""}, facts
    assert set(facts["by_opencv"].values()) == {""}, facts
    assert facts["by_simplejpeg"] == {"JPEG": ""}, facts


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("faiss", "raise ImportError('libcublas.so.12: no such file')", "libcublas.so.12"),
        ("faiss", "import os; os.abort()", "ended the interpreter with SIGABRT"),
        ("faiss", "import sys; sys.exit('bye')", "bye"),
        ("faiss", "", "AttributeError"),
        ("cv2", "raise ImportError('libGL.so.1')", "libGL.so.1"),
    ],
)
def test_a_broken_library_is_an_error_in_words(module, code, said, tmp_path, monkeypatch):
    (tmp_path / f"{module}.py").write_text(code)
    (tmp_path / "torch.py").write_text("raise ImportError")  # not needed here, and slow
    monkeypatch.syspath_prepend(tmp_path)
    facts = probes.ask("decoders" if module == "cv2" else module)
    assert said in facts["error"]


def test_a_library_that_hangs(tmp_path, monkeypatch):
    (tmp_path / "cv2.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(probes, "TIMEOUT", 1)
    assert probes.ask("decoders") == {"error": "did not answer within 1 s"}


@pytest.mark.skipif(not cpp_compiler()[1], reason="no C++ compiler")
def test_the_reason_of_a_trial_that_failed_before(tmp_path, monkeypatch):
    folder = tmp_path / "ssl_xcit" / "kernels"
    folder.mkdir(parents=True)
    built = Path(shutil.copy(kernels().path, folder))
    failed = {"speed": 0.0, "reason": "ended with SIGILL", "time": time.time()}
    record = json.dumps({**failed, "torch": torch.__version__})
    built.with_suffix(".json").write_text(record)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = checks.check_kernels(probes.ask("kernels"))
    assert line.state == "note"
    assert line.facts.endswith("failed in a trial: ended with SIGILL")


def test_a_trial_ends_before_the_probe_around_it():
    assert 2 * kernel_trial.TIMEOUT <= probes.TIMEOUT


def test_the_command_says_what_is_broken_and_exits_1(tmp_path, monkeypatch, capsys):
    """A whole page, with a faiss that aborts."""
    (tmp_path / "faiss.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ssl_xcit").mkdir()
    (tmp_path / "ssl_xcit" / "kernels").symlink_to(cache_folder())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ending:
        cli.main(["doctor", "num_workers=0"])
    assert ending.value.code == 1
    page, error = capsys.readouterr()
    (faiss,) = [line for line in page.splitlines() if line.split()[1] == "faiss"]
    assert faiss.startswith("problem")
    assert "SIGABRT -> pip install" in faiss
    assert "faiss" in error
    for what in (
        "ssl_xcit",
        "cores",
        "memory",
        "torch",
        "GPU",
        "kernels",
        "runs",
        "Pillow",
        "OpenCV",
    ):
        assert f" {what}  " in page
