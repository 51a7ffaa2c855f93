"""The command `embed`: features of every image of a data set as a file.

Extraction goes into a hidden folder beside the file, noted as it goes; a rerun of the same command
goes on there, and the file gets its name when it is whole.
"""

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from ssl_xcit.data.bad import FILE as BAD
from ssl_xcit.data.decode import BadImage, decode
from ssl_xcit.data.preprocess import of_weights
from ssl_xcit.data.sources import Source
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.files import replacing, write_json, written_to
from ssl_xcit.locks import exclusive
from ssl_xcit.models.weights import checkpoint_path, load_backbone, model_name
from ssl_xcit.run_folder import versions
from ssl_xcit.shard import names_digest
from ssl_xcit.table import shown_in_terminal

from .embedded import ENDINGS, Embedded, about_file, write
from .feature_cache import Folder, stamp_of, weights_digest
from .features import KINDS, parts_of
from .frozen import Frozen, placed
from .run import data_of_run, folder_of
from .settings import number

RESIZE, SIZE = 256, 224  # where neither a setting nor the run has one
SAME = ("weights", "images", "names", "stamp", "resize", "size", "features", "dtype", "preprocess")


def main(cfg: DictConfig) -> None:
    """`ssl-xcit embed`: writes one file or several, the images that could not be read beside.

    Raises:
        UserError: a setting is wrong, or a file of other features is in the way.
        RunFailed: too many images are bad.
    """
    outs = outs_of(cfg)
    path = checkpoint_path(str(cfg.ckpt))
    backbone = load_backbone(path, cfg.which)
    source: Source = instantiate(cfg.data.source)
    resize, size = sizes(cfg, path)
    how = of_weights(backbone.preprocess, cfg.max_pixels)
    about = {
        "weights": weights_digest(backbone),
        "ckpt": str(path),
        "which": cfg.which,
        "model": model_name(backbone.architecture),
        "images": len(source),
        "names": names_digest(source),
        "stamp": stamp_of(source),
        "resize": resize,
        "size": size,
        "features": cfg.features,
        "dtype": cfg.dtype,
        "preprocess": how.of_weights(),
        "folder": os.getcwd(),  # that relative names start from
        "versions": versions(),
    }
    todo = [out for out in outs if not is_there(out, about)]
    if not todo:
        print("all of it is there already; remove the files to make them again")
        return
    first, *others = placed(backbone, str(cfg.device))
    frozen = Frozen(backbone, how, first, cfg.batch_size, cfg.num_workers,
                    show=shown_in_terminal(), more_devices=others)  # fmt: skip
    print(f"{path}: {model_name(backbone.architecture)}, {cfg.which}; {len(source):,} images, "
          f"short side {resize}, central {size} x {size}")  # fmt: skip
    work = outs[0].with_name(f".{outs[0].name}.embedding")
    with (
        written_to(outs[0]),
        exclusive(work.with_name(f"{work.name}.lock"), str(outs[0])),
    ):
        try:
            folder = begun(work, about, cfg.dtype)
            features, rows = extracted(folder, frozen, source, resize, size, cfg.features)
            what = Embedded(features, rows, source, about)
            for out in todo:
                write(what, out, cfg.index)
            bad = note_bad(source, rows, how, outs[0])
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on ({work})", flush=True)
            raise
        del what, features
        shutil.rmtree(work)
    say(outs, todo, len(rows), backbone.embed_dim, bad)
    if len(bad) > cfg.data.max_bad_fraction * len(source):
        raise RunFailed(
            f"{len(bad):,} of {len(source):,} images are bad and were left out, more than "
            f"data.max_bad_fraction={cfg.data.max_bad_fraction:g} allows; the others are written"
        )


def outs_of(cfg: DictConfig) -> list[Path]:
    """The files to write.

    Raises:
        UserError: none, one twice, of another format; or another setting is wrong.
    """
    given = cfg.out if isinstance(cfg.out, ListConfig) else [cfg.out]
    outs = [Path(str(word)).expanduser() for word in given]
    for out in outs:
        if out.suffix not in ENDINGS or out.is_dir():
            raise UserError(f"out={out}: a file ending in {', '.join(ENDINGS)}")
    if not outs or len({out.resolve() for out in outs}) < len(outs):
        raise UserError(f"out={cfg.out}: one file, or several of different names")
    if cfg.features not in KINDS:
        raise UserError(f"features={cfg.features}: one of {', '.join(KINDS)}")
    if cfg.dtype not in ("float32", "float16"):
        raise UserError(f"dtype={cfg.dtype}: float32 or float16")
    if cfg.index not in ("flat", "ivf", "hnsw"):
        raise UserError(f"index={cfg.index}: flat, ivf or hnsw")
    if cfg.which not in ("teacher", "student"):
        raise UserError(f"which={cfg.which}: teacher or student")
    for name in ("batch_size", "max_pixels", "resize", "size"):
        if cfg[name] is not None:
            number(name, cfg[name], int, 1)
    if cfg.num_workers is not None:
        number("num_workers", cfg.num_workers, int, 0)
    return outs


def sizes(cfg: DictConfig, path: Path) -> tuple[int, int]:
    """Short side and central square: of the settings, else what the run was measured at."""
    resize, size = RESIZE, SIZE
    if (folder_of(path) / "run.json").is_file() and None in (cfg.resize, cfg.size):
        # its images may be elsewhere by now
        with suppress(UserError, OSError, ValueError, KeyError, Exception):
            if pair := data_of_run(str(cfg.ckpt)):
                resize, size = pair.resize, pair.size
    return cfg.resize or resize, cfg.size or size


def differing(before: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """What is not the same; times of files that were just written tell nothing."""
    found = [key for key in SAME if before.get(key) != about[key]]
    if "stamp" in found and None in (before.get("stamp"), about["stamp"]):
        found.remove("stamp")
    return found


def is_there(out: Path, about: dict[str, Any]) -> bool:
    """Whether it is written already.

    Raises:
        UserError: it is another file.
    """
    if not out.exists():
        return False
    before = about_file(out)
    if before and not (differs := differing(before, about)):
        print(f"{out} is there")
        return True
    what = f"made with another {', '.join(differs)}" if before else "none that ssl-xcit embed made"
    raise UserError(f"out={out} is there, and {what}: name another file, or remove it")


def begun(work: Path, about: dict[str, Any], dtype: str) -> Folder:
    """The hidden folder, new or of an earlier start of the same command.

    Raises:
        UserError: it was begun with other settings.
    """
    work.mkdir(exist_ok=True)
    note = work / "settings.json"
    if note.is_file():
        differs = differing(json.loads(note.read_text()), about)
        if differs:
            raise UserError(
                f"{work} was begun with another {', '.join(differs)}: name another out=..., or "
                "remove it"
            )
    write_json(about, note)
    return Folder(work, dtype)


def extracted(
    folder: Folder, frozen: Frozen, source: Source, resize: int, size: int, kind: str
) -> tuple[Any, Any]:
    """(N, C) features and (N,) images, on the disk."""
    parts = parts_of([kind]) if kind != "patch" else ["patch"]
    wanted = list(KINDS[kind])
    if missing := folder.missing(parts):
        folder.fill(frozen, source, resize, size, missing, "features")
    found, rows = folder.load(wanted)
    if len(wanted) == 1:
        return found[wanted[0]], rows
    return Joined([found[name] for name in wanted]), rows


class Joined:
    """Several parts of the same rows beside each other, joined where they are looked at."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.shape = (len(arrays[0]), sum(a.shape[1] for a in arrays))
        self.dtype = arrays[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return np.concatenate([array[rows] for array in self.arrays], axis=-1)


def note_bad(source: Source, rows: Any, how: Any, out: Path) -> list[int]:
    """`NAME.bad_samples.jsonl` with the reasons; which images."""
    bad = np.setdiff1d(np.arange(len(source)), rows).tolist()
    path = out.with_name(f"{out.name}.{BAD}")
    if not bad:
        path.unlink(missing_ok=True)
        return []
    with replacing(path) as part, part.open("w") as file:
        for index in bad:
            reason = "could not be read then"
            try:
                decode(source.read(index), how)
            except BadImage as error:
                reason = str(error)
            name = source.name(index).encode("utf-8", "backslashreplace").decode()
            file.write(json.dumps({"place": index, "name": name, "reason": reason}) + "\n")
    return bad


def say(outs: Sequence[Path], todo: Sequence[Path], count: int, width: int, bad: list[int]) -> None:
    """What was made, and what to type next."""
    for out in todo:
        print(f"written: {out}, {count:,} rows ({out.stat().st_size / 1e6:,.1f} MB)")
    if bad:
        print(f"  {len(bad):,} images could not be read: {outs[0]}.{BAD}")
    print(f"next: ssl-xcit search index={outs[0]} image=FILE")
