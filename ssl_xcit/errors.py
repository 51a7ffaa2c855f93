"""What the user can mend: the command line prints these as one line and exits 2."""


class UserError(ValueError):
    """A setting or an input is wrong; the message names the fix."""


class MissingPath(UserError, FileNotFoundError):
    """A file or folder that was named is not there, or holds nothing of use."""


class RunFailed(RuntimeError):
    """A run cannot go on, through no fault of the settings or of ours: one line, exit 1."""
