"""What a run's folder is called, and which settings have a say in that."""

import re
from collections.abc import Sequence
from hashlib import sha256

from ssl_xcit.training.settings import FREE_KEYS

SMALL_MODEL = "xcit_micro_4_p8"  # of `finetune` on the built-in images, which needs no word


def key_of(word: str) -> str:
    """`a.b` of `++a.b=1`, `~a.b` and `a@b=c`'s a."""
    return word.partition("=")[0].lstrip("+~").partition("@")[0]


def run_name(data: str, overrides: Sequence[str]) -> str:
    """A folder name that the same overrides always give: `photos_optim.lr-0.001_seed-1`."""
    rest = [o for o in that_matter(overrides) if not o.startswith(("data=", "trainer="))]
    if data == "photos":  # whose recipe goes without saying
        rest = [o.replace("=[photos,", "=[") for o in rest if o != "experiment=photos"]
        rest = [re.sub(r"^experiment=\[(\w+)\]$", r"experiment=\1", o) for o in rest]
    return folder_name(rest, data)


def that_matter(overrides: Sequence[str]) -> list[str]:
    """Those that change results."""
    keys = {o: key_of(o) for o in overrides}
    within = tuple(f"{key}." for key in FREE_KEYS)
    return [o for o in overrides if keys[o] not in FREE_KEYS and not keys[o].startswith(within)]


def folder_name(overrides: Sequence[str], first: str = "") -> str:
    """Overrides as the name of a folder, behind a first word."""
    overrides = [re.sub(r"(?<=://)[^/@]*@|\?.*", "", o) if "://" in o else o for o in overrides]
    words = [re.sub(r"[^\w.+-]+", "-", o) for o in overrides]  # an address without its login
    name = "_".join([first, *words] if first else words)
    # paths and long lists lose something in a name; a hash tells them apart
    if len(name) > 80 or any("/" in o for o in overrides):
        digest = sha256("\0".join(overrides).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        name = f"{name[:80].rstrip('-_')}_{digest}"
    return name
