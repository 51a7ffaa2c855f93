"""What commands refuse, and a few photographs as folders: labelled images of 17 classes."""

import shutil

import numpy as np
import pytest
from commands import run


@pytest.fixture
def refused(capsys):
    """Check that a command ends with exit code 2 and one message, of which this is a part."""

    def check(said, *words):
        capsys.readouterr()
        assert run(*words) == 2, words
        error = capsys.readouterr().err
        assert said in error, (words, error)
        assert sum(line.startswith("ssl-xcit: ") for line in error.splitlines()) == 1, error
        assert "Traceback" not in error

    return check


@pytest.fixture(scope="session")
def few_photos(photos_pair, tmp_path_factory):
    """FOLDER/train/CLASS/N.png and FOLDER/test/CLASS/N.png: 6 and 3 of each class."""
    home = tmp_path_factory.mktemp("few")
    for part, count in (("train", 6), ("test", 3)):
        source = getattr(photos_pair, part)
        for label, name in enumerate(source.class_names):
            (home / part / name).mkdir(parents=True)
            rows = np.flatnonzero(source.labels == label)
            for i in rows[:: len(rows) // count][:count]:
                shutil.copy(source.name(int(i)), home / part / name / f"{i}.png")
    return home


@pytest.fixture(scope="session")
def on_few_photos(few_photos):
    """Settings that name them."""
    words = {
        "root": few_photos / "train",
        "test_root": few_photos / "test",
        "resize": 64,
        "size": 48,
    }
    return [f"eval_data.{key}={value}" for key, value in words.items()]
