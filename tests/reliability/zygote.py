"""A process that has imported everything and forks a run for each line it reads: real processes
with signals, exit codes and output of their own, without seconds of imports for each.

In: {"words", "cwd", "env", "out", "err", "call"}; out: {"pid"}, and {"pid", "status"} at its end.
`call` names functions of `tricks` to run before the command.
"""

import importlib
import json
import os
import selectors
import signal
import sys
from pathlib import Path


def main():
    import torch

    torch.set_num_threads(1)
    import tricks

    for name in ("commands.pretrain", "eval.online", "eval.runner"):
        importlib.import_module(f"ssl_xcit.{name}")
    from ssl_xcit import cli

    def report(**content):
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    def run(job):
        os.setsid()
        for name, number in (("out", 1), ("err", 2)):
            descriptor = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(descriptor, number)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        for name in job["call"]:
            getattr(tricks, name)()
        # ranks that Lightning starts are the installed command
        sys.argv = [str(Path(sys.executable).parent / "ssl-xcit")]
        cli.main(job["words"])

    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    events = selectors.DefaultSelector()
    events.register(read, selectors.EVENT_READ)
    events.register(sys.stdin.fileno(), selectors.EVENT_READ)
    report(ready=True)
    while True:
        for key, _ in events.select():
            if key.fd == read:
                os.read(read, 1024)
                continue
            line = os.read(key.fd, 1 << 20)
            if not line:
                return
            for job in line.decode().splitlines():
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    run(json.loads(job))
                    return  # the usual end of a process, with its handlers
                report(pid=pid)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            report(pid=pid, status=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
