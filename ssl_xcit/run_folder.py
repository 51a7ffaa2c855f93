"""A run's folder: its name, the settings it was made with, and whether a command may go on in
it.
"""

import csv
import json
import logging
import os
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ssl_xcit import __version__
from ssl_xcit.data.identity import DataIndex, difference, load_indices, save_indices
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.files import replacing, sweep, write_json
from ssl_xcit.hardware import machine
from ssl_xcit.locks import exclusive
from ssl_xcit.models.weights import checkpoints_of
from ssl_xcit.run_name import FREE_KEYS, FREE_TRAINER_KEYS, PATH_KEYS

log = logging.getLogger(__name__)
IMAGES = "images.npz"


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
    if recorded not in (None, fingerprint(before), fingerprint_with_paths(path)):
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
        longer = ""
        if before.get("epochs") != now.get("epochs"):
            longer = (
                f". To train for longer, start a new run from its weights: init.ckpt={run_dir} "
                "init.head=kept name=...; learning rate, weight decay and teacher are scheduled "
                "anew over its own epochs, warm-up included"
            )
        raise UserError(
            f"{run_dir} was made with {', '.join(differs[:4])}{more}: take another name=..., or "
            f"remove the folder{longer}"
        )


def fingerprint_with_paths(config: Path) -> str:
    """As runs had it that were begun when paths of images counted among the settings."""
    return fingerprint(settings(OmegaConf.load(config), free=(*FREE_KEYS, *FREE_TRAINER_KEYS)))


def settings(
    cfg: Any, free: Sequence[str] = (*FREE_KEYS, *FREE_TRAINER_KEYS, *PATH_KEYS)
) -> dict[str, Any]:
    """Flat keys and values of everything that changes results, but for those that are free."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            name = f"{prefix}{key}"
            if name in free:
                continue
            if isinstance(value, dict | list):
                walk(value, f"{name}.")
            else:
                flat[name] = value

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    if flat.get("init.ckpt") is None:  # how a run would start from weights says nothing then
        flat = {key: value for key, value in flat.items() if not key.startswith("init.")}
    return flat


def is_begun(run_dir: Path) -> bool:
    """Whether there is something to go on with."""
    return bool(checkpoints_of(run_dir)) or (run_dir / "summary.json").is_file()


class DataRecord(NamedTuple):
    """The images that a run is made of, for its folder.

    Args:
        indices: which, by the setting that names them.
        preprocess: how they are read, `Preprocess.of_weights`.
        changed: what is not as when the run was begun, in words by setting.
    """

    indices: Mapping[str, DataIndex]
    preprocess: Mapping[str, Any]
    changed: Mapping[str, str]


def check_same_data(
    run_dir: Path,
    indices: Mapping[str, DataIndex],
    preprocess: Preprocess,
    elsewhere: Sequence[str],
    go_on: bool,
) -> DataRecord:
    """A run folder goes on with the images it was made with, wherever they lie.

    Args:
        run_dir: the folder.
        indices: of the images at hand, by the setting that names them.
        preprocess: how they are read.
        elsewhere: what `moved_paths` says.
        go_on: although they have changed.

    Raises:
        UserError: the images have changed, or are read otherwise; says what to type.
    """
    record = DataRecord(indices, preprocess.of_weights(), {})
    about = about_run(run_dir)
    if not is_begun(run_dir) or not about:
        return record
    if about.get("preprocess") not in (None, record.preprocess):
        raise UserError(
            f"{run_dir} was made of images read with {about['preprocess']}: preprocess.stats and "
            "the other settings of preprocess must be as they were, or take another name=..."
        )
    changed = changes_since(run_dir, about, indices, elsewhere)
    if not changed:
        return record
    words = "; ".join(f"{key}: {each}" for key, each in changed.items())
    if not go_on:
        raise UserError(
            f"{run_dir} was made of other images ({words}): undo that, or add resume.data=changed "
            "to go on all the same, or train anew under another name=..., from its weights with "
            f"init.ckpt={run_dir} init.head=kept"
        )
    effect = "it is evaluated on these from here on"
    if "data" in changed:
        effect = (
            "their order and the schedules change from here on, and the run is no longer the same, "
            "bit for bit, as one that was not stopped"
        )
    log.warning("%s goes on with other images (%s): %s", run_dir, words, effect)
    return record._replace(changed=changed)


def changes_since(
    run_dir: Path,
    about: Mapping[str, Any],
    indices: Mapping[str, DataIndex],
    elsewhere: Sequence[str],
) -> dict[str, str]:
    """What is not as a run's folder says that it was, in words by setting; empty where all is."""
    known = about.get("data_sha256")
    if not isinstance(known, Mapping):  # begun when images were not recorded
        plan = about.get("plan")
        then = plan.get("num_images") if isinstance(plan, Mapping) else None
        now = indices["data"].num_images
        if then not in (None, now):
            words = f"{then} images then, {now} now"
            return {"data": f"{words}, where files without a known ending count too"}
        words = f"{', '.join(elsewhere)}, and which images they were then is not recorded"
        return {"data": words} if elsewhere else {}
    before = load_indices(run_dir / IMAGES)
    found = {}
    for key in [*indices, *(key for key in known if key not in indices)]:
        now = indices[key].num_images if key in indices else 0
        if key not in indices:
            found[key] = "images then, none now"
        elif key not in known:
            found[key] = f"none then, {now:,} images now"
        elif known[key] != indices[key].digest():
            words = difference(before[key], indices[key]) if key in before else ""
            found[key] = words or f"{now:,} images now, not those of then"
    return found


def moved_paths(cfg: DictConfig, run_dir: Path) -> list[str]:
    """Paths of images that are not those which the run's folder has, in words."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return []
    before, there = OmegaConf.load(path), str(about_run(run_dir).get("folder", "."))
    words = []
    for key in PATH_KEYS:
        then, now = OmegaConf.select(before, key), OmegaConf.select(cfg, key)
        if key.startswith("data.source.") or None in (then, now) or then == now:
            continue
        places = [
            os.path.realpath(os.path.join(folder, os.path.expanduser(str(value))))
            for folder, value in ((there, then), (".", now))
        ]
        if places[0] != places[1]:
            words.append(f"{key} was {then} and is {now}")
    return words


def moved_run(cfg: DictConfig, indices: Mapping[str, DataIndex]) -> Path | None:
    """A run in `out` that was not named, with these settings and these images, which lay elsewhere
    then; None: none. The same on every rank, also when one has begun to write there.
    """
    wanted = fingerprint(settings(cfg))
    digests = {key: index.digest() for key, index in indices.items()}
    for file in sorted(Path(str(cfg.out)).glob("*/run.json")):
        about = about_run(file.parent)
        same = about.get("fingerprint") == wanted and about.get("data_sha256") == digests
        overrides = about.get("overrides")
        words = overrides if isinstance(overrides, list) else ["name="]
        named = any(str(word).lstrip("+").startswith("name=") for word in words)
        if same and not named and is_begun(file.parent):
            return file.parent
    return None


def write_settings(
    cfg: DictConfig,
    plan: Mapping[str, Any],
    run_dir: Path,
    resumed_at: int | None,
    data: DataRecord,
) -> None:
    """`config.yaml` (resolved), `run.json` (overrides, choices, derived numbers, the machine, the
    steps at which the run went on) and `images.npz` (which images).
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    hydra = HydraConfig.get()
    before = about_run(run_dir)
    resumed = before.get("resumed")
    if resumed_at is None or not isinstance(resumed, list):  # from the start
        resumed = [] if resumed_at is None else [resumed_at]
    elif resumed_at not in resumed:
        resumed = [*resumed, resumed_at]
    changes = before.get("data_changes") if resumed_at is not None else []
    changes = changes if isinstance(changes, list) else []
    if data.changed:
        changes = [*changes, {"step": resumed_at or 0, "data": dict(data.changed)}]
    if data.changed or resumed_at is None or not (run_dir / IMAGES).is_file():
        save_indices(data.indices, run_dir / IMAGES)
    run = {
        "overrides": list(hydra.overrides.task),
        "choices": OmegaConf.to_container(hydra.runtime.choices),
        "plan": dict(plan),
        "versions": versions(),
        "machine": machine(),
        "resumed": resumed,
        "folder": os.getcwd(),  # that relative paths start from
        "data_sha256": {key: index.digest() for key, index in data.indices.items()},
        "data_changes": changes,
        "preprocess": data.preprocess,
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
