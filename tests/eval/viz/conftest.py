"""Runs that the tests of pictures share, each made once."""

import shutil

import pytest
from commands import run
from PIL import Image
from tiny_run import LABELS, PICTURES, PLAIN, make_run, published

from ssl_xcit.data.photos import photographs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with `run`, and `net.pth` in published form."""
    folder = tmp_path_factory.mktemp("tiny")
    make_run(folder / "run")
    published(folder / "net.pth")
    return folder


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A copy, in the current folder."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with `runs/with`, trained on `own`, 24 windows of two photographs: 9 steps of 8
    images, with pictures at 4 moments.
    """
    folder = tmp_path_factory.mktemp("trained")
    for name, file in photographs():
        if name in ("astronaut", "coffee"):
            (folder / "own" / name).mkdir(parents=True)
            picture = Image.open(file).convert("RGB").resize((384, 288))
            for i in range(12):
                left, top = i % 4 * 96, i // 4 * 96
                window = picture.crop((left, top, left + 96, top + 64))
                window.save(folder / f"own/{name}/{i:02d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("pretrain", "name=with", "logger=wandb", *PLAIN, *PICTURES, *LABELS) == 0
    return folder
