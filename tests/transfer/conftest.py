"""A run of each task, made once a session."""

from pathlib import Path

import pytest
from commands import run
from toys import KINDS, data, words


@pytest.fixture(scope="session")
def transfer_runs(tmp_path_factory) -> dict[str, Path]:
    """Finished run folders by the kind of task, of a few steps on images of noise; copy them before
    you change them.
    """
    home = tmp_path_factory.mktemp("transfer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for kind in KINDS:
            assert run(*words(kind, data(kind, home / "data" / kind), f"name={kind}")) == 0
    return {kind: home / "runs" / kind for kind in KINDS}
