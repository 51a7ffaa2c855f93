"""The manifest of a folder of checkpoints: step, size and SHA-256 of each file, in `manifest.json`.

An entry is written before its file gets its name, so a named file without an entry comes from
elsewhere, and an entry without a file means nothing.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ssl_xcit.errors import UserError
from ssl_xcit.utils.files import sha256_of, write_json

log = logging.getLogger(__name__)
FILE = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """A file at the time when it was written."""

    step: int
    bytes: int
    sha256: str


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Entries by file name; none where there is no manifest, or one that cannot be read."""
    path = folder / FILE
    try:
        rows = json.loads(path.read_text())["files"]
        return {
            str(name): Entry(int(row["step"]), int(row["bytes"]), str(row["sha256"]))
            for name, row in rows.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): checkpoints are taken without checksums", path, error)
        return {}


def add_entry(path: Path, entry: Entry) -> None:
    """Add the entry of a file that is about to get its name."""
    write_manifest(path.parent, {**read_manifest(path.parent), path.name: entry})


def drop_lost_entries(folder: Path) -> None:
    """Remove the entries of files that are gone."""
    known = read_manifest(folder)
    present = {name: entry for name, entry in known.items() if (folder / name).exists()}
    if present != known:
        write_manifest(folder, present)


def write_manifest(folder: Path, files: Mapping[str, Entry]) -> None:
    """Write the manifest, whole or not at all."""
    content = {name: asdict(entry) for name, entry in sorted(files.items())}
    write_json({"files": content}, folder / FILE)


def verify(path: Path) -> bool:
    """Compare a file with its entry; False when it has none.

    Raises:
        UserError: it differs.
    """
    entry = read_manifest(path.parent).get(path.name)
    if entry is None:
        return False
    size = path.stat().st_size
    if size != entry.bytes:
        raise UserError(f"{path} has {size:,} bytes, not the {entry.bytes:,} that were written")
    if sha256_of(path) != entry.sha256:
        raise UserError(f"{path} is not what was written: its SHA-256 differs from {FILE}'s")
    return True
