"""Checkpoint files: which one a word names, and what it holds as plain tensors. Read with
`weights_only=True`, so a hostile one runs no code.
"""

import json
import os
import re
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.models.checkpoint_manifest import verify
from ssl_xcit.models.foreign import read_pickled
from ssl_xcit.models.published import TIMM, TIMM_FILE, fetch_released, is_address, results_folder

HEADER = "ssl_xcit"  # metadata key of a safetensors file: architecture and preprocess, as JSON


def checkpoint_path(path: str | Path) -> Path:
    """The file that `ckpt=` names: the file itself; a run folder's newest checkpoint (the highest
    step in its name); an exported folder's `model.safetensors`; or, downloaded once, a released
    file by name or address (`published.fetch_released`).

    Raises:
        MissingPath: there is none.
        UserError: it cannot be downloaded, or may not be read.
    """
    try:
        return resolve(path)
    except PermissionError as error:
        raise UserError(f"ckpt={path}: {error.filename}: {error.strerror}") from error


def resolve(path: str | Path) -> Path:
    """See `checkpoint_path`."""
    word, path = str(path), Path(path)
    check_unsharded(path)
    try:
        os.stat(path / "checkpoints")
    except PermissionError:  # `is_file` and `is_dir` say no more since Python 3.14
        raise
    except OSError:
        pass
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            os.listdir(path / "checkpoints")  # raises where it may not be read
        if checkpoints := checkpoints_of(path):
            return checkpoints[-1]
        if (path / TIMM_FILE).is_file():
            return path / TIMM_FILE
        raise MissingPath(
            f"ckpt={path}: a folder without checkpoints/step-*.ckpt or {TIMM_FILE}; name a file"
        )
    by_network = is_address(word) or word.startswith(TIMM) or "#sha256=" in word
    if not by_network and (path.suffix or "/" in word):  # a path, and not a name
        raise MissingPath(f"ckpt={path}: no such file or run folder")
    return fetch_released(word, sys.stdout.isatty())


def folder_of(path: Path) -> Path:
    """The run folder of weights, or the folder that a lone file lies in; of downloaded weights one
    here, by their name.
    """
    if (downloaded := results_folder(path)) is not None:
        return downloaded
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def check_unsharded(path: Path) -> None:
    """Raise UserError, with the command that makes one file, for a sharded checkpoint."""
    folder = path.parent if path.suffix == ".distcp" or path.name == ".metadata" else path
    file = shlex.quote(f"{folder.absolute().name}.pth")
    if (folder / ".metadata").is_file():
        raise UserError(
            f"ckpt={path}: a sharded checkpoint of torch.distributed.checkpoint; make one file of "
            "it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{shlex.quote(str(folder))} {file}"
        )
    if (folder / "zero_to_fp32.py").is_file():
        raise UserError(
            f"ckpt={path}: a sharded checkpoint of DeepSpeed; make whole files of it: "
            f"python {shlex.quote(str(folder / 'zero_to_fp32.py'))} {shlex.quote(str(folder))} out"
        )


def checkpoints_of(run_dir: Path) -> list[Path]:
    """`RUN/checkpoints/step-000100.ckpt` and the like, by step, the newest last."""
    files = (run_dir / "checkpoints").glob("step-*.ckpt")
    numbered = [(int(m[1]), f) for f in files if (m := re.fullmatch(r"step-(\d+)\.ckpt", f.name))]
    return [file for _, file in sorted(numbered)]


def read_weights(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with an error of the disk as one for the user."""
    try:
        return read_checkpoint(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's dictionary, on the CPU; tensors and plain containers only.

    Raises:
        UserError: it cannot be read, or differs from its entry in the manifest beside it.
        OSError: the disk cannot be read.
    """
    path.open("rb").close()  # an error of the disk is not one of the content
    verify(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        content = read_pickled(path)
    except UserError:
        raise
    except Exception as error:  # torch raises half a dozen types for a damaged or foreign file
        if "torchscript" in str(error).lower():
            raise UserError(
                f"{path} is a TorchScript program: torch.save(torch.jit.load({path.name!r})"
                ".state_dict(), 'weights.pth') takes the weights out of it"
            ) from error
        # only the telling line of torch's message
        line = re.search(r"[^\n:]*(Unsupported global|Can only|Trying to).*", str(error))
        if line or zipfile.is_zipfile(path):
            reason = (line[0] if line else str(error)).strip().partition("\n")[0]
            reason = reason.partition(". ")[0]
        else:
            reason = "truncated or not a PyTorch file"
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}; copy or "
            "download it again, or save weights alone, torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors under `model`, and the metadata that `ssl-xcit export` writes.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library is written in Rust and raises its own types
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {reason}; copy or "
            "download it again"
        ) from error
    return {**(metadata if isinstance(metadata, dict) else {}), "model": tensors}
