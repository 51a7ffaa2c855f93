"""Weights by name: XCiT's released files (arXiv:2106.09681: supervised; arXiv:2104.14294: DINO) at
their public addresses, and timm's on the Hugging Face hub.

No checksums of them were ever published, so none are built in: give one as `NAME#sha256=HEX`.
"""

import difflib
import hashlib
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from ssl_xcit.errors import MissingPath, UserError
from ssl_xcit.files import default_cache, sha256_of
from ssl_xcit.models.download import Elsewhere, check_given, check_kept, fetched
from ssl_xcit.models.xcit import SIZES

SUPERVISED = "https://dl.fbaipublicfiles.com/xcit/{}.pth"
DINO = "https://dl.fbaipublicfiles.com/dino/{0}_pretrain/{0}_pretrain{1}.pth"
DINO_MODELS = (
    "xcit_small_12_p16", "xcit_small_12_p8", "xcit_medium_24_p16", "xcit_medium_24_p8",
)  # fmt: skip
TIMM = "timm/"
TIMM_FILE = "model.safetensors"


def published() -> dict[str, str]:
    """Address by name, 50 of them: `dino_xcit_small_12_p16` (with `_full`: student, teacher, heads
    and center), `xcit_small_12_p16_224`, `..._224_dist` (distilled), `..._384_dist`.
    """
    found = {}
    for model in DINO_MODELS:
        found[f"dino_{model}"] = DINO.format(f"dino_{model}", "")
        found[f"dino_{model}_full"] = DINO.format(f"dino_{model}", "_full_checkpoint")
    for size in SIZES:
        for patch in (16, 8):
            for kind in ("224", "224_dist", "384_dist"):
                name = f"xcit_{size}_p{patch}_{kind}"
                found[name] = SUPERVISED.format(name)
    return found


def weights_folder() -> Path:
    """Where downloaded weights are kept."""
    return default_cache() / "weights"


def is_address(word: str) -> bool:
    """Of the network."""
    return word.startswith(("http://", "https://"))


def found_by_name(word: str, show: bool = False) -> Path:
    """The file of weights that are called by name or by address, downloaded once.

    Args:
        word: a name of `published`, `timm/NAME`, or an address; `#sha256=HEX` behind it is what the
            file must be.
        show: a progress bar.

    Raises:
        MissingPath: there is no such name.
        UserError: no network, or the file is not what it must be.
    """
    name, _, sha256 = word.partition("#sha256=")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"{word}: 64 hexadecimal digits behind #sha256=")
    if name.startswith(TIMM):
        return from_hub(name, sha256 or None)
    if Path(name).is_file():
        check_given(Path(name), sha256_of(Path(name)), sha256 or None)
        return Path(name)
    known = published()
    if not is_address(name) and name not in known:
        raise MissingPath(unknown(name, known))
    address = known.get(name, name)
    return fetched(address, kept_as(address, known), sha256 or None, show)


def kept_as(address: str, known: dict[str, str]) -> Path:
    """The released files by their own name; others may share one, so each has a folder.

    Raises:
        UserError: no file's address.
    """
    parts = urlsplit(address)
    file = parts.path.rsplit("/", 1)[-1]
    if not parts.hostname or file in ("", ".", ".."):
        raise UserError(f"ckpt={address}: no file's address; such as https://HOST/FILE.pth")
    if address in known.values():
        return weights_folder() / file
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    return weights_folder() / f"{parts.hostname}-{digest}" / file


def from_hub(name: str, sha256: str | None) -> Path:
    """timm's weights: brought by hand, from the hub's own cache (as timm has it), or from the hub.

    Raises:
        UserError: huggingface_hub is missing, no network, no such repository, or a file that has
            changed.
    """
    path = weights_folder() / name / TIMM_FILE
    if path.is_file():
        check_kept(path, sha256)
        return path
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise UserError(
            f"ckpt={name} needs huggingface_hub: pip install 'ssl-xcit[hub]'"
        ) from error
    try:
        found = try_to_load_from_cache(name, TIMM_FILE)
        if not isinstance(found, str):
            if not getproxies():  # without a network the library tries for half a minute
                socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
            found = hf_hub_download(name, TIMM_FILE)
        file = Path(found)
        digest = sha256_of(file)
    except Exception as error:  # a dozen types of two libraries
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise Elsewhere(
            f"ckpt={name} cannot be had from the Hugging Face hub ({reason}): is it called so "
            f"there? Without a network, bring its {TIMM_FILE} as {path}, or anywhere with "
            "ckpt=FILE"
        ) from error
    told = file.resolve().name  # the hub calls large files by their SHA-256
    if re.fullmatch(r"[0-9a-f]{64}", told) and told != digest:
        raise UserError(
            f"{file} has changed since it was downloaded (SHA-256 {digest}): remove "
            f"{file.resolve()}, and it is downloaded again"
        )
    check_given(file, digest, sha256)
    return file


def unknown(word: str, known: dict[str, str]) -> str:
    """What was probably meant."""
    if any(word == f"xcit_{size}_p{patch}" for size in SIZES for patch in (4, 8, 16)):
        there = [name for name in known if word in name] or ["none"]
        return (
            f"ckpt={word}: no such file or run folder; it is the name of an architecture, and "
            f"released weights of it are {', '.join(there)}"
        )
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    if close:
        return f"ckpt={word}: no such file or run folder; did you mean {close[0]}?"
    return (
        f"ckpt={word}: no such file or run folder; names of released weights are such as "
        "dino_xcit_small_12_p16, xcit_small_12_p16_224_dist, timm/xcit_small_12_p16_224.fb_in1k"
    )


def place_of(path: Path) -> Path | None:
    """Where results of downloaded weights go: a folder of their name here, and not the cache; None
    for other weights.
    """
    if path.parent.parent.name == "snapshots":  # of the Hugging Face hub
        repository = re.fullmatch(r"models--.+?--(.+)", path.parents[2].name)
        return Path(repository[1]) if repository else None
    if not path.is_absolute() or not path.is_relative_to(weights_folder()):
        return None
    return Path(path.parent.name if path.name == TIMM_FILE else path.stem)
