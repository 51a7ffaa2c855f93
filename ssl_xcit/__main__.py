"""`python -m ssl_xcit COMMAND ...`; a sweep's trial ends with the process that started it."""

import os
import signal

from ssl_xcit.cli import main
from ssl_xcit.sweeps.job import IN_USE, PARENT, end_with
from ssl_xcit.utils.locks import InUse

if __name__ == "__main__":
    parent = os.environ.pop(PARENT, "")
    if parent:
        end_with(int(parent), signal.SIGTERM)
    try:
        main()
    except SystemExit as ending:
        if parent and isinstance(ending.__context__, InUse):  # the sweep waits for whoever has it
            raise SystemExit(IN_USE) from None
        raise
