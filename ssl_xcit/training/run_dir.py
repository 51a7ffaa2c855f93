"""A run's folder: the settings it was made with, and whether a command may go on in it."""

import csv
import json
import logging
import os
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ssl_xcit import __version__
from ssl_xcit.data.identity import DataIndex, difference, load_indices, save_indices
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.models.checkpoint_files import checkpoints_of
from ssl_xcit.models.kernel_trial import kernel_speed
from ssl_xcit.training.settings import FREE_KEYS, NAMES, place_keys
from ssl_xcit.utils.files import read_json, remove_partial, replacing, write_json
from ssl_xcit.utils.hardware import machine
from ssl_xcit.utils.locks import exclusive
from ssl_xcit.utils.validation import can_be_imported, flat

log = logging.getLogger(__name__)
IMAGES = "images.npz"
DINO_HEADS = ("dino", "swav")  # objectives whose head `init.head=kept` takes over


def check_same_run(settings: Mapping[str, Any], run_dir: Path) -> None:
    """Check that a run folder goes on with the settings it was made with.

    Raises:
        UserError: `settings`, `as_plain` of all of them, are others; lists them.
    """
    path = run_dir / "config.yaml"
    if not is_begun(run_dir):
        return
    places = place_keys(settings)
    now, recorded = identity(settings, places), about_run(run_dir).get("fingerprint")
    if not path.is_file():
        if recorded in (None, fingerprint(now)):
            return
        raise UserError(
            f"{run_dir} was made with other settings, and its config.yaml is gone: take another "
            "name=..., or remove the folder"
        )
    before = identity(OmegaConf.to_container(OmegaConf.load(path)), places)
    differs = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    targets = [str(before[key]) for key in differs if key.endswith("_target_") and key in before]
    if gone := [path for path in targets if not can_be_imported(path)]:
        raise UserError(
            f"{run_dir} was begun with another version of ssl_xcit, which had {gone[0]}: go on "
            f"with that version, or start a new run from its weights: "
            f"{from_weights_of(run_dir)} name=..."
        )
    if "objective._target_" in now and "objective._target_" not in before:
        raise UserError(
            f"{run_dir} was begun with another version of ssl_xcit, which had one objective: go on "
            f"with that version, or start a new run from its weights: "
            f"{from_weights_of(run_dir)} name=..."
        )
    if recorded not in (None, fingerprint(before)):
        raise UserError(
            f"{path} has been changed since the run was made: undo that, or take another name=..."
        )
    if differs:
        words = [f"{key}={before.get(key)} (now {now.get(key)})" for key in differs[:4]]
        more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
        longer = ""
        if {"epochs", "max_steps", "budget"} & set(differs):
            longer = (
                f". To train for longer, start a new run from its weights: "
                f"{from_weights_of(run_dir)} name=...; what changes with the step is "
                "scheduled anew over its own epochs, warm-up included"
            )
        raise UserError(
            f"{run_dir} was made with {', '.join(words)}{more}: take another name=..., or "
            f"remove the folder{longer}"
        )


def from_weights_of(run_dir: Path) -> str:
    """What to type to start a new run from the weights of this one, by its record; a head is kept
    where it is one of DINO.
    """
    choices = about_run(run_dir).get("choices")
    choices = choices if isinstance(choices, Mapping) else {}
    if "transfer" in choices:
        return f"ckpt={run_dir}"
    kept = choices.get("objective", "dino") in DINO_HEADS
    return f"init.ckpt={run_dir} init.head={'kept' if kept else 'fresh'}"


# settings that older runs did not have, with the values that say what they did
AS_BEFORE = {
    "trainer.batch_norm": "global", "trainer.gradient_exchange": "float32", "max_steps": None,
    "budget": None, "objective.spread": 0.0,
}  # fmt: skip


def identity(settings: Any, places: Sequence[str]) -> dict[str, Any]:
    """Flat keys and values of all settings that make a run another run."""
    outside = (*FREE_KEYS, *places)
    within = tuple(f"{key}." for key in outside)
    kept = {
        key: value
        for key, value in flat(settings)
        if key not in outside and not key.startswith(within) and key.split(".")[0] in NAMES
    }
    kept = {key: value for key, value in kept.items() if AS_BEFORE.get(key, ...) != value}
    if kept.get("init.ckpt") is None:  # how a run would start from weights says nothing then
        kept = {key: value for key, value in kept.items() if not key.startswith("init.")}
    return kept


def is_begun(run_dir: Path) -> bool:
    """Whether there is something to go on with."""
    return bool(checkpoints_of(run_dir)) or (run_dir / "summary.json").is_file()


class DataRecord(NamedTuple):
    """The images that a run is made of, for its folder."""

    indices: Mapping[str, DataIndex]  # which, by the setting that names them
    preprocess: Mapping[str, Any]  # how they are read, `Preprocess.of_weights`
    changed: Mapping[str, str]  # what is not as when the run was begun, in words by setting


def check_same_data(
    run_dir: Path, indices: Mapping[str, DataIndex], preprocess: Preprocess, go_on: bool
) -> DataRecord:
    """A run folder goes on with the images it was made with, wherever they lie; with `go_on` also
    with others. `indices` are of the images at hand, by the setting that names them.

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
    changed = changes_since(run_dir, about, indices)
    if not changed:
        return record
    words = "; ".join(f"{key}: {each}" for key, each in changed.items())
    if not go_on:
        raise UserError(
            f"{run_dir} was made of other images ({words}): undo that, or add resume.data=changed "
            "to go on all the same, or train anew under another name=..., from its weights with "
            f"{from_weights_of(run_dir)}"
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
    run_dir: Path, about: Mapping[str, Any], indices: Mapping[str, DataIndex]
) -> dict[str, str]:
    """What is not as a run's folder says that it was, in words by setting; empty where all is."""
    known = about.get("data_sha256")
    if not isinstance(known, Mapping):  # no run of ours; its settings are the same
        return {}
    before = load_indices(run_dir / IMAGES)
    changes = {}
    for key in [*indices, *(key for key in known if key not in indices)]:
        now = indices[key].num_images if key in indices else 0
        if key not in indices:
            changes[key] = "images then, none now"
        elif key not in known:
            changes[key] = f"none then, {now:,} images now"
        elif known[key] != indices[key].digest():
            words = difference(before[key], indices[key]) if key in before else ""
            changes[key] = words or f"{now:,} images now, not those of then"
    return changes


def moved_paths(settings: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Paths of images that are not those which the run's folder has, in words."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return []
    before, now = dict(flat(OmegaConf.to_container(OmegaConf.load(path)))), dict(flat(settings))
    folder = str(about_run(run_dir).get("folder", "."))
    words = []
    for key in place_keys(settings):
        pair = (before.get(key), now.get(key))
        if key.startswith("data.source.") or None in pair or pair[0] == pair[1]:
            continue
        places = [
            os.path.realpath(os.path.join(start, os.path.expanduser(str(value))))
            for start, value in zip((folder, "."), pair, strict=True)
        ]
        if places[0] != places[1]:
            words.append(f"{key} was {pair[0]} and is {pair[1]}")
    return words


def moved_run(settings: Mapping[str, Any], indices: Mapping[str, DataIndex]) -> Path | None:
    """A run in `out` that was not named, with these settings and these images, which lay elsewhere
    then; None: none. The same on every rank, also when one has begun to write there.
    """
    wanted = fingerprint(identity(settings, place_keys(settings)))
    digests = {key: index.digest() for key, index in indices.items()}
    for file in sorted(Path(str(settings["out"])).glob("*/run.json")):
        about = about_run(file.parent)
        same = about.get("fingerprint") == wanted and about.get("data_sha256") == digests
        overrides = about.get("overrides")
        words = overrides if isinstance(overrides, list) else ["name="]
        named = any(str(word).lstrip("+").startswith("name=") for word in words)
        if same and not named and is_begun(file.parent):
            return file.parent
    return None


def write_settings(
    settings: Mapping[str, Any],
    plan: Mapping[str, Any],
    run_dir: Path,
    resumed_at: int | None,
    data: DataRecord,
    kernels: bool | None,
) -> None:
    """Write `config.yaml` (resolved), `run.json` (overrides, choices, derived numbers, the machine,
    whether networks take its kernels, the steps at which the run went on) and `images.npz` (which
    images).
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
        "kernels": kernels,
        "resumed": resumed,
        "folder": os.getcwd(),  # that relative paths start from
        "data_sha256": {key: index.digest() for key, index in data.indices.items()},
        "data_changes": changes,
        "preprocess": data.preprocess,
        "run_id": settings["run_id"],
        "fingerprint": fingerprint(identity(settings, place_keys(settings))),
    }
    with replacing(run_dir / "config.yaml") as part:
        OmegaConf.save(OmegaConf.create(dict(settings)), part)
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
    return read_json(run_dir / "run.json")


def note_steps(run_dir: Path, **steps: int) -> None:
    """Note other numbers of the plan in `run.json`."""
    if about := about_run(run_dir):
        write_json({**about, "plan": {**about["plan"], **steps}}, run_dir / "run.json")


def kernels_of(run_dir: Path) -> bool | None:
    """Whether a run that has begun takes the kernels of a CPU, as noted unless they fail here, so
    that it goes on with the same bits whatever a trial finds; None: nothing decides it.
    """
    noted = kernels_noted(run_dir)
    fails = noted and not torch.cuda.is_available() and kernel_speed() == 0.0
    return False if fails else noted


def kernels_noted(run_dir: Path) -> bool | None:
    """Whether a run was begun with the kernels of a CPU; None: it is not begun or does not say."""
    if not is_begun(run_dir):
        return None
    about = about_run(run_dir)
    kernels = about.get("kernels", True) if about else None  # older runs took them
    return kernels if isinstance(kernels, bool) else None


def run_id_of(run_dir: Path) -> str:
    """The same for all parts of a run, for loggers that continue one."""
    return str(about_run(run_dir).get("run_id") or uuid.uuid4().hex[:8])


@contextmanager
def locked(run_dir: Path, wanted: bool = True) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile; what a killed process left half-written is
    removed. One rank holds the lock: where it is not `wanted`, nothing is done.

    Raises:
        UserError: another process holds it; says which.
    """
    if not wanted:
        yield
        return
    with exclusive(run_dir / ".lock", str(run_dir), "wait for it, or take another name=..."):
        for folder in (run_dir, run_dir / "checkpoints"):
            remove_partial(folder)
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
        "lightning": version("lightning"),
    }
