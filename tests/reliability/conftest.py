"""See runs.py."""

import os
import signal

import pytest
from runs import HERE, Place, Zygote


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.reliability)


@pytest.fixture(scope="session")
def zygote(cache):
    one = Zygote(cache.parent)
    yield one
    one.process.stdin.close()
    one.process.wait(10)


@pytest.fixture
def place(zygote, tmp_path):
    here = Place(zygote, tmp_path)
    yield here
    for run in here.runs:  # what a failed test leaves
        if not run.over():
            os.killpg(run.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def whole(zygote, tmp_path_factory, photos_pair):
    """A run that nothing happened to."""
    here = Place(zygote, tmp_path_factory.mktemp("whole"))
    here()
    return here
