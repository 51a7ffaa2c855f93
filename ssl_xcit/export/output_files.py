"""Write exported files: each is complete and compared before it gets its name."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ssl_xcit.errors import UserError
from ssl_xcit.export.description import Weights
from ssl_xcit.models.published import results_folder
from ssl_xcit.utils.files import flush, writable_folder, writable_or_here, write_json

ENDINGS = (".onnx", ".safetensors", ".pt2", ".pth", ".pt", ".json")


@dataclass
class Exported:
    """The result of an export."""

    paths: list[Path]  # files and folders
    checked: str  # how it was compared, in words
    use: str  # lines of Python that use it
    notes: list[str] = field(default_factory=list)  # other things to know

    def sizes(self) -> str:
        """Paths with their sizes, of folders that of all files in them."""
        sizes = []
        for path in self.paths:
            files = [file for file in (path, *path.rglob("*")) if file.is_file()]
            megabytes = sum(file.stat().st_size for file in files) / 1e6
            sizes.append(f"{path} ({megabytes:,.1f} MB)")
        return ", ".join(sizes)


def output_path(out: str | None, weights: Path, run_dir: Path | None, name: str) -> Path:
    """The path that every format adds its ending to, in a folder that can be written.

    `out` is the setting: a path without ending, or a folder, where `name` is added; None: by the
    place of the weights, which may lie in a run folder.

    Raises:
        UserError: it has an ending already, or cannot be written.
    """
    if out is None:
        if run_dir is None and (downloaded := results_folder(weights)) is not None:
            return writable_or_here(downloaded) / name
        return writable_or_here(run_dir or weights.parent, "export") / name
    path = Path(out).expanduser()
    if path.is_dir() or out.endswith("/"):
        path = path / name
    elif path.suffix in ENDINGS:
        raise UserError(f"out={out}: give the path without ending; each format adds its own")
    writable_folder(path.parent)
    return path


def write_description(weights: Weights, path: Path, **more: Any) -> Path:
    """Write a JSON file with everything that is known of the weights, and return its path."""
    network = {"architecture": weights.architecture, "preprocess": weights.preprocess.of_weights()}
    write_json({**network, **weights.about_task(), **weights.about, **more}, path)
    return path


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Save as safetensors with the usual permissions: the library denies others to read."""
    save_file(tensors, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def with_ending(out: Path, ending: str) -> Path:
    """The path with an ending behind its name, which may have dots."""
    return out.with_name(out.name + ending)


@contextmanager
def replacing_path(out: Path, names: Collection[str] = ()) -> Iterator[Path]:
    """A temporary path for a file or a folder, which takes the place of `out` at the end, or is
    removed. It is on the disk before it gets the name.

    A folder that holds other files than `names` is not replaced.

    Raises:
        UserError: there is something else at this path.
    """
    if out.is_dir() and (others := sorted(p.name for p in out.iterdir() if p.name not in names)):
        raise UserError(
            f"{out} holds {others[0]}, which this command has not written: move it, or name "
            "another out="
        )
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    remove(part)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        for path in (*part.rglob("*"), part):
            flush(path)
        if out.is_dir():
            remove(out)
        os.replace(part, out)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require(extra: str, *modules: str) -> None:
    """Raise UserError, with the command that installs it, for a library that is missing."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(
                f"this format needs {module}: pip install 'ssl-xcit[{extra}]'"
            ) from error
