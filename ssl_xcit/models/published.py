"""Get weights by name: XCiT's released files (arXiv:2106.09681: supervised; arXiv:2104.14294: DINO)
from their public addresses, and timm's from the Hugging Face hub.

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
from ssl_xcit.models.download import check_sha256, fetch, verify_cached
from ssl_xcit.models.xcit import SIZES
from ssl_xcit.utils.files import default_cache, sha256_of

SUPERVISED = "https://dl.fbaipublicfiles.com/xcit/{}.pth"
DINO = "https://dl.fbaipublicfiles.com/dino/{0}_pretrain/{0}_pretrain{1}.pth"
DINO_MODELS = (
    "xcit_small_12_p16", "xcit_small_12_p8", "xcit_medium_24_p16", "xcit_medium_24_p8",
)  # fmt: skip
TIMM = "timm/"
TIMM_FILE = "model.safetensors"


def released_addresses() -> dict[str, str]:
    """Addresses by name, 50 of them: `dino_xcit_small_12_p16` (with `_full`: student, teacher,
    heads and center), `xcit_small_12_p16_224`, `..._224_dist` (distilled), `..._384_dist`.
    """
    addresses = {}
    for model in DINO_MODELS:
        addresses[f"dino_{model}"] = DINO.format(f"dino_{model}", "")
        addresses[f"dino_{model}_full"] = DINO.format(f"dino_{model}", "_full_checkpoint")
    for size in SIZES:
        for patch in (16, 8):
            for kind in ("224", "224_dist", "384_dist"):
                name = f"xcit_{size}_p{patch}_{kind}"
                addresses[name] = SUPERVISED.format(name)
    return addresses


def weights_folder() -> Path:
    """Where downloaded weights are kept."""
    return default_cache() / "weights"


def is_address(word: str) -> bool:
    """Whether a word is an address of the network."""
    return word.startswith(("http://", "https://"))


def fetch_released(word: str, show: bool = False) -> Path:
    """A file of weights by its name or address, downloaded once.

    Args:
        word: a name of `released_addresses`, `timm/NAME`, or an address; `#sha256=HEX` behind it is
            the digest that the file must have.
        show: a progress bar.

    Raises:
        MissingPath: there is no such name.
        UserError: no network, or the file has another digest.
    """
    name, _, sha256 = word.partition("#sha256=")
    if sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"{word}: #sha256= takes 64 hexadecimal digits")
    if name.startswith(TIMM):
        return from_hub(name, sha256 or None)
    if Path(name).is_file():
        check_sha256(Path(name), sha256_of(Path(name)), sha256 or None)
        return Path(name)
    known = released_addresses()
    if not is_address(name) and name not in known:
        raise MissingPath(unknown_name(name, known))
    address = known.get(name, name)
    return fetch(address, cached_path(address, known), sha256 or None, show)


def cached_path(address: str, known: dict[str, str]) -> Path:
    """Where a downloaded file is kept: a released one under its own name; others may share a name,
    so each has a folder.

    Raises:
        UserError: the address names no file.
    """
    parts = urlsplit(address)
    file = parts.path.rsplit("/", 1)[-1]
    if not parts.hostname or file in ("", ".", ".."):
        raise UserError(f"ckpt={address}: not the address of a file, such as https://HOST/FILE.pth")
    if address in known.values():
        return weights_folder() / file
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    return weights_folder() / f"{parts.hostname}-{digest}" / file


def from_hub(name: str, sha256: str | None) -> Path:
    """timm's weights: copied here by hand, in the hub's own cache (as timm has it), or from the
    hub.

    Raises:
        UserError: huggingface_hub is missing, no network, no such repository, or the file has
            changed.
    """
    path = weights_folder() / name / TIMM_FILE
    if path.is_file():
        verify_cached(path, sha256)
        return path
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    except ImportError as error:
        raise UserError(
            f"ckpt={name} needs huggingface_hub: pip install 'ssl-xcit[hub]'"
        ) from error
    try:
        cached = try_to_load_from_cache(name, TIMM_FILE)
        if not isinstance(cached, str):
            if not getproxies():  # without a network the library tries for half a minute
                socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
            cached = hf_hub_download(name, TIMM_FILE)
        file = Path(cached)
        digest = sha256_of(file)
    except Exception as error:  # a dozen types of two libraries
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(
            f"ckpt={name} cannot be downloaded from the Hugging Face hub ({reason}): check the "
            f"name. Without a network, copy its {TIMM_FILE} to {path}, or anywhere with ckpt=FILE"
        ) from error
    expected = file.resolve().name  # the hub names large files by their SHA-256
    if re.fullmatch(r"[0-9a-f]{64}", expected) and expected != digest:
        raise UserError(
            f"{file} has changed since it was downloaded (SHA-256 {digest}): remove "
            f"{file.resolve()} to download it again"
        )
    check_sha256(file, digest, sha256)
    return file


def unknown_name(word: str, known: dict[str, str]) -> str:
    """The message for a name without a file, with the nearest name."""
    if any(word == f"xcit_{size}_p{patch}" for size in SIZES for patch in (4, 8, 16)):
        released = ", ".join(name for name in known if word in name) or "none"
        hint = f"it is the name of an architecture, and released weights of it are {released}"
    elif close := difflib.get_close_matches(word, list(known), n=1, cutoff=0.7):
        hint = f"did you mean {close[0]}?"
    else:
        hint = (
            "names of released weights are such as dino_xcit_small_12_p16, "
            "xcit_small_12_p16_224_dist, timm/xcit_small_12_p16_224.fb_in1k"
        )
    return f"ckpt={word}: no such file or run folder; {hint}"


def results_folder(path: Path) -> Path | None:
    """Where results of downloaded weights go, a folder of their name, not the cache; else None."""
    if path.parent.parent.name == "snapshots":  # of the Hugging Face hub
        repository = re.fullmatch(r"models--.+?--(.+)", path.parents[2].name)
        return Path(repository[1]) if repository else None
    if not path.is_absolute() or not path.is_relative_to(weights_folder()):
        return None
    return Path(path.parent.name if path.name == TIMM_FILE else path.stem)
