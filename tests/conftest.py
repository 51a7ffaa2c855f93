"""Shared by all tests: few threads, no network, the photographs cut once a session."""

import logging
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from ssl_xcit.data.photos import labelled_photos
from ssl_xcit.models.kernel_trial import kernel_speed
from ssl_xcit.models.kernels import cache_folder

kernel_speed()  # built and tried before a test says what a command prints, or how long it takes
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_collection_modifyitems(items):
    """Put the longest test first: the other process does the rest meanwhile."""
    items.sort(key=lambda item: item.name != "test_the_demo_learns")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever looks for the network finds none (local sockets stay)."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family == socket.AF_UNIX or (
            isinstance(address, tuple) and address[0] in ("127.0.0.1", "localhost", "::1")
        ):
            return connect(self, address)
        raise OSError(f"the tests are offline, and this asks for {address}")

    resolve = socket.getaddrinfo

    def no_names(host, *args, **kwargs):
        if host == "127.0.0.1":
            return resolve(host, *args, **kwargs)
        raise socket.gaierror(f"the tests are offline, and this asks for {host}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", no_names)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A command writes its log to the standard error of its test, which is closed afterwards."""
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers


@pytest.fixture(autouse=True)
def no_wandb_service():
    """wandb's process outlives a test and would write relative paths into that test's folder."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A cache folder of this session, as XDG_CACHE_HOME has it; commands find kernels there."""
    folder = tmp_path_factory.mktemp("cache") / "ssl_xcit"
    folder.mkdir()
    (folder / "kernels").symlink_to(cache_folder())
    os.environ["XDG_CACHE_HOME"] = str(folder.parent)
    return folder


@pytest.fixture(scope="session")
def photos_pair(cache):
    return labelled_photos(cache)
