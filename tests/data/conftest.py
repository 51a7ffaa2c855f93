"""Warnings that are logged once a process are logged once a test here."""

import pytest

from ssl_xcit.data import folders


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch):
    monkeypatch.setattr(folders, "warned", set())
