"""The command `export`: weights into files that other tools read, each loaded and compared before
it gets its name.
"""

import json
import re
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from ssl_xcit.data.module import check_labelled
from ssl_xcit.data.preprocess import Preprocess, of_weights
from ssl_xcit.data.sources import LabelledPair
from ssl_xcit.errors import RunFailed, UserError
from ssl_xcit.export.exported import Weights, title
from ssl_xcit.export.rounded import KNN
from ssl_xcit.files import sha256_of, writable_folder, writable_or_here, written_to
from ssl_xcit.models.published import TIMM_FILE, place_of
from ssl_xcit.models.weights import checkpoint_path, checkpoints_of, load_backbone, model_name
from ssl_xcit.run_folder import versions
from ssl_xcit.table import shown_in_terminal
from ssl_xcit.terminal import say


def main(cfg: DictConfig) -> None:
    """`ssl-xcit export`: prints what was written, how it was compared and how it is used."""
    if cfg.which not in ("teacher", "student"):
        raise UserError(f"which={cfg.which}: teacher or student")
    formats = wanted(cfg)
    path = checkpoint_path(str(cfg.ckpt))
    backbone = load_backbone(path, cfg.which)
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else None
    name = name_of(path, run_dir, cfg.which)
    pair = labelled(cfg, run_dir, of_weights(backbone.preprocess))
    weights = Weights(
        backbone, name, about(cfg.which, path, run_dir, model_name(backbone.architecture)),
        *((pair.resize, pair.size) if pair else ()),
    )  # fmt: skip
    out = out_of(cfg, path, run_dir, name)
    say(f"{path}: {title(weights)}, {cfg.which}")
    if backbone.architecture["num_classes"]:
        say("its classifier is left out: features are exported")
    knn: KNN | None = None if pair is None else instantiate(cfg.knn)(pair)
    failed = []
    for word in formats:
        make = instantiate(cfg.formats[word])
        settings: dict[str, Any] = {"knn": knn} if "knn" in signature(make.func).parameters else {}
        if shown_in_terminal():  # a large network takes minutes
            say("", f"{word} ...")
        try:
            with written_to(out.parent):
                made = make(weights, out, **settings)
        except (UserError, RunFailed) as error:  # the others are made all the same
            if len(formats) == 1:
                raise type(error)(f"format={word}: {error}") from error
            say(f"{word}: not exported: {error}")
            failed.append(error)
            continue
        sizes = [f"{each} ({size_of(each):,.1f} MB)" for each in made.paths]
        say("", f"{word}: {', '.join(sizes)}")
        for line in (made.checked, *made.notes):
            say(f"  {line}")
        say(*(f"    {line}" for line in made.use.splitlines()))
    if failed:
        raise type(failed[0])(
            f"{len(failed)} of {len(formats)} formats were not exported, see above"
        )


def wanted(cfg: DictConfig) -> list[str]:
    """The formats that are asked for.

    Raises:
        UserError: one is not known, or there is none.
    """
    given = cfg.format
    words = [str(w) for w in given] if isinstance(given, ListConfig) else [str(given)]
    words = [word.replace("-", "_") for word in words]
    known = [str(key) for key in cfg.formats]
    for word in words:
        if word not in known:
            raise UserError(f"format={word}: one of {', '.join(known)}")
    if not words:
        raise UserError(f"format=[]: one or several of {', '.join(known)}")
    return list(dict.fromkeys(words))


def labelled(cfg: DictConfig, run_dir: Path | None, how: Preprocess) -> LabelledPair | None:
    """Images that accuracy is measured on where a format changes the numbers; None without."""
    of_run = HydraConfig.get().runtime.choices["eval_data"] == "of_run"
    if not cfg.get("eval_data") or (of_run and run_dir is None):
        return None
    try:
        pair: LabelledPair | None = instantiate(cfg.eval_data)
        if pair is not None:
            check_labelled(pair, how)
    except (UserError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if not of_run or not isinstance(cause, UserError):
            raise
        return None  # the run's images may be elsewhere by now
    return pair


def name_of(path: Path, run_dir: Path | None, which: str) -> str:
    """Of what is written: no two networks have the same."""
    if run_dir is not None:
        name = run_dir.absolute().name
        if path not in checkpoints_of(run_dir)[-1:]:
            name += f"-{path.stem}"
    elif (place := place_of(path)) is not None:
        name = place.name
    else:
        name = path.absolute().parent.name if path.name == TIMM_FILE else path.stem
    return name + "-student" * (which == "student")


def about(which: str, path: Path, run_dir: Path | None, model: str) -> dict[str, Any]:
    """What is known of the weights, as plain data; paths by their last part, for it is given away.

    Numbers are those of these very weights, or none.
    """
    digest, run = sha256_of(path), read(run_dir, "run.json")
    overrides = run.get("overrides")
    step = re.fullmatch(r"step-(\d+)", path.stem)
    each = (run.get("plan") or {}).get("steps_per_epoch")
    return {
        "model": model,
        "file": path.name,
        "sha256": digest,
        "which": which,
        **measured(which, path, run_dir, digest),
        "overrides": None if overrides is None else [last_parts(str(o)) for o in overrides],
        "steps": int(step[1]) if step else None,
        "epochs": round(int(step[1]) / each, 2) if step and each else None,
        "versions": versions(),
    }


def measured(which: str, path: Path, run_dir: Path | None, digest: str) -> dict[str, Any]:
    """The run's numbers of these weights: of its end, and of `ssl-xcit eval`, which go before."""
    end, own = read(run_dir, "summary.json"), read(run_dir, "results.json")
    last = (end.get("last") or {}).get("step")
    sources = []
    if which == "teacher" and last is not None and path.stem == f"step-{int(last):06d}":
        sources.append(end)
    if own.get("weights_sha256") == digest and own.get("which") == which:
        sources.append(own)
    numbers: dict[str, Any] = {"data": None, "results": {}, "intervals": {}}
    for source in sources:
        if source.get("data"):
            numbers["data"] = last_parts(str(source["data"]))
        for kind in ("results", "intervals"):
            for row, values in (source.get(kind) or {}).items():
                numbers[kind].setdefault(row, {}).update(values)
    return numbers


def last_parts(words: str) -> str:
    """`data.root=/home/me/photos` as `data.root=photos`."""
    return re.sub(r"[^\s=,\[\](){}'\"]*/(?=[^\s/])", "", words)


def read(run_dir: Path | None, name: str) -> dict[str, Any]:
    """A file of the run, where there is one."""
    with suppress(OSError, ValueError):
        if run_dir is not None:
            return dict(json.loads((run_dir / name).read_text()))
    return {}


def out_of(cfg: DictConfig, path: Path, run_dir: Path | None, name: str) -> Path:
    """What every format adds its ending to, in a folder that can be written.

    Raises:
        UserError: it has an ending already, or cannot be written.
    """
    if cfg.out is None:
        if run_dir is None and (place := place_of(path)) is not None:
            return writable_or_here(place) / name
        return writable_or_here(run_dir or path.parent, "export") / name
    out = Path(str(cfg.out)).expanduser()
    if out.is_dir() or str(cfg.out).endswith("/"):
        out = out / name
    elif out.suffix in (".onnx", ".safetensors", ".pt2", ".pth", ".pt", ".json"):
        raise UserError(f"out={cfg.out}: without ending; each format has its own")
    writable_folder(out.parent)
    return out


def size_of(path: Path) -> float:
    """Of a file or a folder, in MB."""
    files = [path, *path.rglob("*")]
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e6
