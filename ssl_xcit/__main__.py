"""`python -m ssl_xcit COMMAND ...`, as `ssl-xcit COMMAND ...`; a trial of a sweep ends with the
process that has started it.
"""

import os
import signal

from ssl_xcit.cli import main
from ssl_xcit.sweeps.job import PARENT, end_with

if __name__ == "__main__":
    parent = os.environ.pop(PARENT, "")
    if parent:
        end_with(int(parent), signal.SIGTERM)
    main()
