"""The command `shard`: a data set written as tar shards in the WebDataset layout.

Each shard is written beside its final name, read back and compared, then renamed; a rerun of the
same command goes on behind the last whole one.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ssl_xcit.data.bad import FILE
from ssl_xcit.data.decode import MAX_BYTES, BadImage, open_picture
from ssl_xcit.data.loader import look_at_all
from ssl_xcit.data.order import permutation
from ssl_xcit.data.preprocess import Preprocess
from ssl_xcit.data.shards import list_tar
from ssl_xcit.data.sources import Source, Stored
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.files import writable_folder, write_json
from ssl_xcit.plan import check_numbers
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say, track

NUMBERS = (
    ("num_workers", True, 0),
    ("worker_timeout", False, None),
    ("images_per_shard", True, 1),
    ("seed", True, 0),
    ("data.max_bad_fraction", False, 0),
)
PROGRESS = ".progress.jsonl"  # one line a shard that is whole
TSV = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})  # of a name in its cell
SUFFIXES = {
    b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"BM": "bmp", b"GI": "gif",
    b"II": "tif", b"MM": "tif", b"\x93N": "npy", b"P5": "pgm", b"P6": "ppm",
}  # fmt: skip


class Job(NamedTuple):
    """What every shard is made from."""

    source: Source
    how: Preprocess
    order: np.ndarray  # of the images
    images_per_shard: int
    out: Path


def main(cfg: DictConfig) -> None:
    """`ssl-xcit shard`: writes `shard-000000.tar` and so on, `keys.tsv` and `shards.json`.

    Raises:
        UserError: the folder holds shards that were made with other settings.
        RunFailed: a shard read back is not what was written, or too many images are bad.
    """
    check_numbers(cfg, NUMBERS)
    source: Source = instantiate(cfg.data.source)
    how: Preprocess = instantiate(cfg.preprocess)
    out, count = Path(str(cfg.out)), len(source)
    order = permutation(cfg.seed, 0, count) if cfg.shuffle else np.arange(count)
    job = Job(source, how, order, cfg.images_per_shard, out)
    data = dict(OmegaConf.to_container(cfg.data, resolve=True))  # type: ignore[arg-type]
    del data["max_bad_fraction"]  # may change on the way
    settings = {
        "data": data,
        "images": count,
        "names": names_digest(source),
        **{key: cfg[key] for key in ("images_per_shard", "shuffle", "seed")},
        "preprocess": {**how.of_weights(), "max_pixels": how.max_pixels},
    }
    num_shards = -(-count // cfg.images_per_shard)
    writable_folder(out)
    strangers = sorted(out.glob("*.tar"))
    if strangers and not any((out / name).exists() for name in (PROGRESS, "shards.json")):
        raise UserError(f"out={out} holds other tars, such as {strangers[0].name}: name another")
    with (out / PROGRESS).open("a+") as progress:
        try:
            fcntl.flock(progress, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"out={out}: another process is writing there; wait for it") from error
        done = finished(out, settings)
        for left in out.glob(".shard-*.part"):
            left.unlink()
        todo = [number for number in range(num_shards) if number not in done]
        if done and todo:
            say(f"{len(done)} of {num_shards} shards are whole; going on")
        if todo and not (out / PROGRESS).read_text().endswith("}\n"):
            note(progress, settings)
        write = look_at_all(
            partial(write_chosen, job, todo), len(todo), cfg.num_workers,
            timeout=cfg.worker_timeout, chunk=1,
        )  # fmt: skip
        for (record,) in track(write, "shards", len(todo), shown_in_terminal()):
            done[record["number"]] = record
            note(progress, record)
    finish(job, settings, [done[number] for number in range(num_shards)])
    bad = sum(len(record["bad"]) for record in done.values())
    if bad > cfg.data.max_bad_fraction * count:
        raise RunFailed(
            f"{bad:,} of {count:,} images are bad and were left out, more than "
            f"data.max_bad_fraction={cfg.data.max_bad_fraction:g} allows: see {out / FILE}"
        )


def names_digest(source: Source) -> str:
    """Of which images there are, so that a rerun goes on with the same."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(os.fsencode(source.name(index)) + b"\0")
    return digest.hexdigest()[:16]


def finished(out: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Records of the shards that are whole, from an earlier start of the same command.

    Raises:
        UserError: they were made with other settings.
    """
    lines = []
    for file in (out / "shards.json", out / PROGRESS):
        if file.is_file() and file.name == "shards.json":
            content = json.loads(file.read_text())
            lines = [content["made_with"], *content["shards"]]
            break
        if file.is_file():
            for text in file.read_text().splitlines():
                with contextlib.suppress(ValueError):  # cut short
                    lines.append(json.loads(text))
    if not lines:
        return {}
    before = lines[0]
    differs = [key for key in settings if before.get(key) != settings[key]]
    if differs:
        raise UserError(
            f"out={out} was begun with another {', '.join(differs)}: name another folder, or "
            "remove it"
        )
    whole = {}
    for record in lines[1:]:
        if "number" not in record:  # the settings once more
            continue
        path = out / record["file"]
        if path.is_file() and path.stat().st_size == record["bytes"]:
            whole[record["number"]] = record
    return whole


def note(file: TextIO, content: dict[str, Any]) -> None:
    """A line that is on the disk when this returns."""
    file.write("\n" + json.dumps(content) + "\n")  # the line before may have been cut short
    file.flush()
    os.fsync(file.fileno())


def write_chosen(job: Job, numbers: Sequence[int], place: int) -> dict[str, Any]:
    """One of these shards."""
    return write_shard(job, numbers[place])


def write_shard(job: Job, number: int) -> dict[str, Any]:
    """One tar: its images as they are stored, those that cannot be read left out; read back.

    Raises:
        RunFailed: what was read back differs.
    """
    first = number * job.images_per_shard
    path = job.out / f"shard-{number:06d}.tar"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    bad, digests = [], []
    with part.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            last = min(first + job.images_per_shard, len(job.order))
            for place in range(first, last):
                index = int(job.order[place])
                try:
                    stored = job.source.read(index)
                    open_picture(stored, job.how).pixels()
                    content, suffix = encoded(stored)
                    if len(content) > MAX_BYTES:
                        raise BadImage(f"{len(content):,} bytes, more than {MAX_BYTES:,}")
                except BadImage as error:
                    name = job.source.name(index)
                    bad.append({"place": index, "name": name, "reason": str(error)})
                    continue
                key = f"{place:09d}"
                add(tar, f"{key}.{suffix}", content)
                if job.source.labels is not None:
                    add(tar, f"{key}.cls", str(int(job.source.labels[index])).encode())
                digests.append(hashlib.sha256(content).hexdigest())
        file.flush()
        os.fsync(file.fileno())
    listing = list_tar(str(part))
    with part.open("rb") as file:
        for digest, offset, size in zip(digests, listing.offsets, listing.sizes, strict=True):
            file.seek(offset)
            if hashlib.sha256(file.read(size)).hexdigest() != digest:
                raise RunFailed(f"{part}: what was read back is not what was written: a bad disk?")
    part.replace(path)
    return {
        "number": number,
        "file": path.name,
        "images": len(digests),
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest(),
        "bad": bad,
    }


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without owner and time: the same images give the same tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def encoded(stored: Stored) -> tuple[bytes, str]:
    """Content and suffix; arrays become PNG where that holds them, else .npy."""
    if isinstance(stored, bytes):
        return stored, SUFFIXES.get(stored[:2], "jpg")
    out = io.BytesIO()
    if stored.dtype == np.uint8 and (stored.ndim == 2 or stored.shape[-1] in (1, 3)):
        Image.fromarray(stored.squeeze(-1) if stored.shape[-1] == 1 else stored).save(out, "PNG")
        return out.getvalue(), "png"
    np.save(out, stored, allow_pickle=False)
    return out.getvalue(), "npy"


def finish(job: Job, settings: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """`keys.tsv`, `shards.json`, the list of bad images, and what to type next."""
    out, source = job.out, job.source
    bad = [row for record in records for row in record["bad"]]
    left_out = {row["place"] for row in bad}
    with (out / "keys.tsv").open("w", encoding="utf-8", errors="surrogateescape") as file:
        for place, index in enumerate(job.order.tolist()):
            if index not in left_out:
                file.write(f"{place:09d}\t{source.name(index).translate(TSV)}\n")
    (out / FILE).write_text("".join(json.dumps(row) + "\n" for row in bad))
    images = sum(record["images"] for record in records)
    content = {
        "images": images,
        "labels": source.labels is not None,
        "class_names": list(source.class_names),
        "made_with": settings,
        "shards": list(records),
    }
    write_json(content, out / "shards.json")
    (out / PROGRESS).unlink(missing_ok=True)
    total = sum(record["bytes"] for record in records)
    say(f"{images:,} images in {len(records):,} shards, {total / 1e6:,.0f} MB, each verified")
    if bad:
        say(f"  {len(bad):,} bad images left out, such as {bad[0]['name']} ({bad[0]['reason']})")
    say(f"{out}: shard-*.tar, keys.tsv, shards.json, {FILE}")
    labels = " eval_data.root=DIR" if source.labels is None else f" eval_data.root={out}"
    say(f"next: ssl-xcit pretrain data=shards data.root={out}{labels}")
