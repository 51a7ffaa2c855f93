"""What the user can mend: the command line prints these as one line and exits 2."""

from collections.abc import Sequence


class UserError(ValueError):
    """A setting or an input is wrong; the message names the fix."""


class MissingPath(UserError, FileNotFoundError):
    """A file or folder that was named is not there, or holds nothing of use."""


class RunFailed(RuntimeError):
    """A run cannot go on, through no fault of the settings or of ours: one line, exit 1."""


def first_few(words: Sequence[str]) -> str:
    """The first five words for a message, and the number of the others."""
    more = f" and {len(words) - 5:,} more" if len(words) > 5 else ""
    return "; ".join(words[:5]) + more
