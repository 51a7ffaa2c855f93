"""The command `embed`: features of every image of a data set as a file.

Extraction goes into a hidden folder beside the file, noted as it goes; a rerun of the same command
goes on there, and the file gets its name when it is whole.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
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
from ssl_xcit.terminal import say

from .embedded import ENDINGS, Embedded, about_file, arrow, is_whole, write
from .feature_cache import Folder, stamp_of, weights_digest
from .features import KINDS, parts_of
from .frozen import Frozen, placed
from .run import data_settings_of_run, folder_of
from .settings import number

log = logging.getLogger(__name__)
RESIZE, SIZE = 256, 224  # where neither a setting nor the run has one
DIFFERENT = {  # what a file, or one that was begun, is compared by, and how it is said
    "weights": "from other weights",
    "images": "of {before} images, where there are {now} now",
    "names": "of images with other names",
    "stamp": "of images whose files have changed since",
    "preprocess": "with other preprocess.* settings",
    "resize": "with resize={before}, not {now}",
    "size": "with size={before}, not {now}",
    "features": "with features={before}, not {now}",
    "dtype": "with dtype={before}, not {now}",
    "labels": "with other labels",
    "index": "with index={before}, not {now}",
}


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
    check_not_images(outs, cfg)
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
    labels = labels_digest(source)
    abouts = {out: about | {"labels": labels} for out in outs}
    for out in outs:
        if out.suffix == ".faiss":
            abouts[out]["index"] = cfg.index
    with ExitStack() as stack:
        for out in sorted(outs):  # in one order, so that of two commands one goes on
            lock = out.with_name(f"{hidden(out).name}.lock")
            stack.enter_context(exclusive(lock, str(out)))
        todo = [out for out in outs if not is_there(out, abouts[out])]
        if not todo:
            say("all of it is there already; remove the files to make them again")
            return
        first, *others = placed(backbone, str(cfg.device))
        frozen = Frozen(backbone, how, first, cfg.batch_size, cfg.num_workers,
                        show=shown_in_terminal(), more_devices=others)  # fmt: skip
        say(f"{path}: {model_name(backbone.architecture)}, {cfg.which}; {len(source):,} images, "
              f"short side {resize}, central {size} x {size}")  # fmt: skip
        work = hidden(outs[0])
        try:
            with written_to(outs[0]):
                folder = begun(work, about, cfg.dtype)
                features, rows = extracted(folder, frozen, source, resize, size, cfg.features)
                bad = note_bad(source, rows, how, outs[0])
            for out in todo:
                with written_to(out):
                    write(Embedded(features, rows, source, abouts[out]), out, cfg.index)
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on ({work})")
            raise
        del features
        shutil.rmtree(work)
    conclude(outs, todo, len(rows), bad)
    if len(bad) > cfg.data.max_bad_fraction * len(source):
        raise RunFailed(
            f"{len(bad):,} of {len(source):,} images are bad and were left out, more than "
            f"data.max_bad_fraction={cfg.data.max_bad_fraction:g} allows; the others are written"
        )


def hidden(out: Path) -> Path:
    """The folder beside a file in which its features are gathered."""
    return out.with_name(f".{out.name}.embedding")


def labels_digest(source: Source) -> str | None:
    """SHA-256 of the labels, which are written beside the features."""
    if source.labels is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(source.labels).tobytes()).hexdigest()


def check_not_images(outs: Sequence[Path], cfg: DictConfig) -> None:
    """No file lands among the images as one of them.

    Raises:
        UserError: one would.
    """
    if HydraConfig.get().runtime.choices["data"] != "folder":
        return  # which alone looks for image files
    root = cfg.data.root
    for folder in root if isinstance(root, ListConfig) else [root]:
        place = Path(str(folder)).expanduser().resolve()
        for out in outs:
            if out.suffix == ".npy" and out.resolve().is_relative_to(place):
                raise UserError(
                    f"out={out} lies in data.root={folder}, where the next command would take it "
                    "for an image: name a place outside"
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
    if any(out.suffix == ".parquet" for out in outs):
        arrow()  # now, not after hours
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
        try:
            if data := data_settings_of_run(str(cfg.ckpt)).get("eval_data"):
                # the images may be elsewhere by now, so they are not asked for if settings tell
                looked = data if "size" in data else instantiate(data)
                resize, size = looked.resize, looked.size
        except Exception as error:  # its options may be those of another version
            log.warning(
                "at which size the run was measured cannot be told (%s): resize=%s size=%s",
                str(error).partition("\n")[0], resize, size,
            )  # fmt: skip
    return cfg.resize or resize, cfg.size or size


def differing(before: dict[str, Any], about: dict[str, Any]) -> str:
    """What is not the same, in words; empty where all is."""
    found = [key for key in DIFFERENT if key in about and before.get(key) != about[key]]
    if None in (before.get("stamp"), about["stamp"]) and "stamp" in found:
        found.remove("stamp")  # times of files that were just written tell nothing
    implied = {"images": ("names", "stamp", "labels"), "names": ("stamp", "labels")}
    for key in [key for key in implied if key in found]:
        found = [other for other in found if other not in implied[key]]
    return ", ".join(DIFFERENT[k].format(before=before.get(k), now=about[k]) for k in found)


def is_there(out: Path, about: dict[str, Any]) -> bool:
    """Whether it is written already.

    Raises:
        UserError: it is another file.
    """
    if not out.exists():
        return False
    before = about_file(out)
    if not before or not is_whole(out):
        trouble = "is none that ssl-xcit embed made" if not before else "is not whole"
        raise UserError(f"out={out} is there, and {trouble}: name another file, or remove it")
    if differs := differing(before, about):
        raise UserError(f"out={out} is there, made {differs}: name another file, or remove it")
    say(f"{out} is there")
    return True


def begun(work: Path, about: dict[str, Any], dtype: str) -> Folder:
    """The hidden folder, new or of an earlier start of the same command.

    Raises:
        UserError: it was begun with other settings.
    """
    work.mkdir(exist_ok=True)
    note = work / "settings.json"
    if note.is_file() and (differs := differing(json.loads(note.read_text()), about)):
        raise UserError(f"{work} was begun {differs}: name another out=..., or remove that folder")
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


def conclude(outs: Sequence[Path], todo: Sequence[Path], count: int, bad: list[int]) -> None:
    """What was made, and what to type next."""
    for out in todo:
        say(f"written: {out}, {count:,} rows ({out.stat().st_size / 1e6:,.1f} MB)")
    if bad:
        say(f"  {len(bad):,} images could not be read: {outs[0]}.{BAD}")
    say(f"next: ssl-xcit search index={outs[0]} image=FILE")
