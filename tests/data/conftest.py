"""Warnings that are logged once a process are logged once a test here."""

import pytest


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch):
    monkeypatch.setattr("ssl_xcit.data.folders.warned", set())
