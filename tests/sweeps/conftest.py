"""Sweeps of toys poll often."""

import pytest

from ssl_xcit.sweeps import driver, job


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(driver, "POLL", 0.02)
    monkeypatch.setattr(job, "POLL", 0.02)
