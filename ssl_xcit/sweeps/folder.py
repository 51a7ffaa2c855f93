"""The folder of a sweep: its name, its `sweep.json`, and whether it belongs to the same sweep."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ssl_xcit.errors import UserError
from ssl_xcit.sweeps.space import Space
from ssl_xcit.sweeps.trial import SWEEP_FILE
from ssl_xcit.training.run_name import folder_name, run_name, that_matter
from ssl_xcit.training.settings import SearchSettings
from ssl_xcit.utils.files import read_json, write_json


def sweep_name(search: str, data: str, space: Space) -> str:
    """A name from the settings that all trials share and the keys that vary, but not their values:
    more values belong to the same sweep.
    """
    varied = ["sweep" if search == "grid" else search, *space.swept]
    return folder_name(varied, run_name(data, space.fixed))


def check_same_sweep(folder: Path, fixed: Sequence[str], places: Sequence[str]) -> None:
    """Raise UserError for a folder that is a run, or has trials of other settings.

    Args:
        folder: of the sweep.
        fixed: overrides that all trials share.
        places: keys of paths, which may change: each trial checks its data.
    """
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is a run, not a sweep: take another name=...")
    content = read_json(folder / SWEEP_FILE)
    before, now = (
        {word for word in words if word.partition("=")[0].lstrip("+~") not in places}
        for words in (content.get("fixed", []), that_matter(fixed))
    )
    if content and before != now:
        raise UserError(
            f"{folder} was made with other settings for all its trials "
            f"({' '.join(sorted(before - now)) or 'nothing'}; now "
            f"{' '.join(sorted(now - before)) or 'nothing'}): take another name=..., or remove it"
        )


def write_sweep_file(
    folder: Path, command: str, words: Sequence[str], space: Space, settings: SearchSettings
) -> None:
    """Write `sweep.json`, which `ssl-xcit sweep` reads beside the files of the trials."""
    content = {
        "command": shlex.join(["ssl-xcit", command, "-m", *words]),
        "of": command,
        "all_fixed": list(space.fixed),
        "fixed": that_matter(space.fixed),
        "metric": settings.metric,
        "maximize": settings.maximize,
    }
    write_json(content, folder / SWEEP_FILE)
