"""What a run's folder is called, and which settings have a say in that."""

import re
from collections.abc import Sequence
from hashlib import sha256

# What may differ between the parts of one run: where things are and how they are shown
FREE_KEYS = (
    "name", "out", "num_workers", "worker_timeout", "logger", "callbacks", "main", "hydra",
    "data.max_bad_fraction", "compile", "checkpoint_blocks", "max_skipped", "collective_timeout",
    "run_id", "report", "sweep", "sweeper", "launcher", "resume",
)  # fmt: skip
FREE_KEYS_DOTTED = tuple(f"{key}." for key in FREE_KEYS)
FREE_TRAINER_KEYS = (
    "trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes",
)  # fmt: skip
# Where images lie and how a list is read: a run's identity is which images and labels these are
# (`data.identity`). They
# have a say in the name all the same, for other images mostly lie elsewhere.
PATH_KEYS = (
    *(f"{group}.{key}" for group in ("data", "data.source", "eval_data")
      for key in ("root", "file", "labels", "cache", "download", "out", "test_root", "test_file",
                  "test_labels", "member", "test_member", "image_column", "label_column",
                  "backslashes", "label_kind")),
    "preprocess.stats",
)  # fmt: skip


def run_name(data: str, overrides: Sequence[str]) -> str:
    """A folder name that the same overrides always give: `photos_optim.lr-0.001_seed-1`."""
    rest = [o for o in that_matter(overrides) if not o.startswith(("data=", "trainer="))]
    return folder_name(rest, data)


def that_matter(overrides: Sequence[str]) -> list[str]:
    """Those that change results."""
    kept = [o for o in overrides if o.split("=")[0].lstrip("+~") not in FREE_KEYS]
    return [
        o for o in kept if not o.lstrip("+~").startswith((*FREE_KEYS_DOTTED, *FREE_TRAINER_KEYS))
    ]


def folder_name(overrides: Sequence[str], first: str = "") -> str:
    """Overrides as the name of a folder, behind a first word."""
    words = [re.sub(r"[^\w.+-]+", "-", o) for o in overrides]
    name = "_".join([first, *words] if first else words)
    # paths and long lists lose something in a name; a hash tells them apart
    if len(name) > 80 or any("/" in o for o in overrides):
        digest = sha256("\0".join(overrides).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        name = f"{name[:80].rstrip('-_')}_{digest}"
    return name
