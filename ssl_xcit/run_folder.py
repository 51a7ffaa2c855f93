"""A run's folder: its name, the settings it was made with, and whether a command may go on in
it.
"""

import csv
import fcntl
import json
import logging
import os
import platform
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ssl_xcit import __version__
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.files import replacing, sweep, write_json
from ssl_xcit.hardware import machine
from ssl_xcit.models.weights import checkpoints_of

log = logging.getLogger(__name__)
# What may differ between the parts of one run: where things are and how they are shown
FREE_KEYS = (
    "name", "out", "num_workers", "worker_timeout", "logger", "callbacks", "main", "hydra",
    "data.max_bad_fraction", "compile", "checkpoint_blocks", "max_skipped", "collective_timeout",
    "run_id", "report", "sweep", "sweeper", "launcher",
)  # fmt: skip
FREE_KEYS_DOTTED = tuple(f"{key}." for key in FREE_KEYS)
FREE_TRAINER_KEYS = (
    "trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes",
)  # fmt: skip


def check_same_run(cfg: DictConfig, run_dir: Path) -> None:
    """A run folder goes on with the settings it was made with.

    Raises:
        UserError: others; lists them.
    """
    path = run_dir / "config.yaml"
    if not (checkpoints_of(run_dir) or (run_dir / "summary.json").exists()):
        return  # nothing to go on with
    if not path.is_file():
        if about_run(run_dir).get("fingerprint") in (None, fingerprint(settings(cfg))):
            return
        raise UserError(
            f"{run_dir} was made with other settings, and its config.yaml is gone: take another "
            "name=..., or remove the folder"
        )
    before, now = settings(OmegaConf.load(path)), settings(cfg)
    recorded = about_run(run_dir).get("fingerprint")
    if recorded is not None and recorded != fingerprint(before):
        raise UserError(
            f"{path} has been changed since the run was made: undo that, or take another name=..."
        )
    differs = [
        f"{key}={before.get(key)} (now {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differs:
        more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
        raise UserError(
            f"{run_dir} was made with {', '.join(differs[:4])}{more}: take another name=..., or "
            "remove the folder"
        )


def settings(cfg: Any) -> dict[str, Any]:
    """Flat keys and values of everything that changes results."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            name = f"{prefix}{key}"
            if name in (*FREE_KEYS, *FREE_TRAINER_KEYS):
                continue
            if isinstance(value, dict | list):
                walk(value, f"{name}.")
            else:
                flat[name] = value

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return flat


def write_settings(
    cfg: DictConfig, plan: Mapping[str, Any], run_dir: Path, resumed_at: int | None = None
) -> None:
    """`config.yaml` (resolved) and `run.json` (overrides, choices, derived numbers, the machine,
    the steps at which the run went on).
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    hydra = HydraConfig.get()
    resumed = about_run(run_dir).get("resumed", [])
    if resumed_at is None:  # from the start
        resumed = []
    elif resumed_at not in resumed:
        resumed = [*resumed, resumed_at]
    run = {
        "overrides": list(hydra.overrides.task),
        "choices": OmegaConf.to_container(hydra.runtime.choices),
        "plan": dict(plan),
        "versions": versions(),
        "machine": machine(),
        "resumed": resumed,
        "run_id": cfg.run_id,
        "fingerprint": fingerprint(settings(cfg)),
    }
    with replacing(run_dir / "config.yaml") as part:
        OmegaConf.save(cfg, part, resolve=True)
    write_json(run, run_dir / "run.json")


@contextmanager
def disk_trouble(run_dir: Path) -> Iterator[None]:
    """Of files that a run cannot do without."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{run_dir} cannot be written ({error}): make room, and the same command goes on"
        ) from error


def fingerprint(flat: Mapping[str, Any]) -> str:
    """Of settings that change results."""
    return sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:16]


def about_run(run_dir: Path) -> dict[str, Any]:
    """What `run.json` says; nothing when it cannot be read."""
    try:
        content = json.loads((run_dir / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def run_id_of(run_dir: Path) -> str:
    """The same for all parts of a run, for loggers that continue one."""
    return str(about_run(run_dir).get("run_id") or uuid.uuid4().hex[:8])


@contextmanager
def locked(run_dir: Path, wanted: bool = True) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile; what a killed process left half-written is
    removed.

    Args:
        run_dir: made if need be.
        wanted: only one rank holds it.

    Raises:
        UserError: another process holds it; says which.
    """
    if not wanted:
        yield
        return
    with exclusive(run_dir / ".lock", str(run_dir), "wait for it, or take another name=..."):
        for folder in (run_dir, run_dir / "checkpoints"):
            sweep(folder)
        yield


@contextmanager
def exclusive(path: Path, what: str, otherwise: str = "wait for it") -> Iterator[None]:
    """Nobody else has this lock meanwhile. It is the system's and ends with the process, however
    that ends; children do not inherit it.

    Args:
        path: a file that is made, and removed.
        what: is in use, for the message.
        otherwise: what to do when another process has it.

    Raises:
        UserError: another process has it (says which), or the file cannot be made.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            raise UserError(f"{path.parent}: no folder to write to ({error.strerror})") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(f"{what} is in use by {holder}: {otherwise}") from error
        except OSError as error:
            log.warning("%s: no locks on this file system (%s)", path.parent, error)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # who held it has just removed it: a lock on that file means nothing
    with suppress(OSError):  # a full disk may spoil the text, not the lock
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}\n")
        file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):
            file.close()


def lock_holder(run_dir: Path) -> str:
    """Which process trains in this folder now; empty when none does.

    The system's lock tells, for a killed process leaves the file. It is not to be asked for a lock
    that this process holds: closing the file would give it up.
    """
    try:
        with (run_dir / ".lock").open("rb") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return file.read(300).decode("utf-8", "replace").strip() or "another process"
    except OSError:  # no file, or a file system without locks
        pass
    return ""


def writable_folder(path: Path) -> None:
    """Make it, and see that files can be made in it.

    Raises:
        UserError: neither can be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path}: no folder to write to ({error.strerror})") from error


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """Work whose results go into a folder, or a file; that they cannot is said in a line.

    Raises:
        UserError: the folder cannot be made or written.
        RunFailed: the disk is full, or gone.
    """
    writable_folder(out.parent if out.suffix and not out.is_dir() else out)
    try:
        yield
    except UserError:  # some of which are of files that are not there
        raise
    except OSError as error:
        trouble = f"{out} cannot be written ({error})"
        raise RunFailed(f"{trouble}: make room, and try again") from error


def run_name(data: str, overrides: Sequence[str]) -> str:
    """A folder name that the same overrides always give: `photos_optim.lr-0.001_seed-1`."""
    rest = [o for o in that_matter(overrides) if not o.startswith(("data=", "trainer="))]
    return folder_name(rest, data)


def that_matter(overrides: Sequence[str]) -> list[str]:
    """Those that change results."""
    kept = [o for o in overrides if o.split("=")[0].lstrip("+~") not in FREE_KEYS]
    return [
        o for o in kept if not o.lstrip("+~").startswith((*FREE_KEYS_DOTTED, *FREE_TRAINER_KEYS))
    ]


def folder_name(overrides: Sequence[str], first: str = "") -> str:
    """Overrides as the name of a folder, behind a first word."""
    words = [re.sub(r"[^\w.+-]+", "-", o) for o in overrides]
    name = "_".join([first, *words] if first else words)
    # paths and long lists lose something in a name; a hash tells them apart
    if len(name) > 80 or any("/" in o for o in overrides):
        digest = sha256("\0".join(overrides).encode()).hexdigest()[:8]
        name = f"{name[:80].rstrip('-_')}_{digest}"
    return name


def last_row(run_dir: Path) -> dict[str, float]:
    """The last report of the training metrics; nothing where none could be written."""
    try:
        with (run_dir / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["loss"]]
    except FileNotFoundError:
        rows = []
    return {key: float(value) for key, value in rows[-1].items() if value} if rows else {}


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {
        "ssl_xcit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
