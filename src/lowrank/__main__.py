"""`python -m lowrank` is `lowrank`, and how its process ends."""

import os
import sys
import threading

from lowrank import launch
from lowrank.cli import main

SIGNALLED = 128  # an exit status above it: a signal, or Ctrl-C, ended the command


def run() -> None:
    """The command of sys.argv, and the end of this process.

    Of several processes each leaves as soon as it is done: torch.distributed's threads may be at work when Python is
    taken down, and now and then one aborts the process for it (SIGABRT), whose work is done and saved: a launcher would
    tell of a failure. Where a signal ended the command nobody waits for a thread that goes on, as one does whose chat
    template never ends.
    """
    status = main()
    at_work = [thread for thread in threading.enumerate() if not (thread.daemon or thread is threading.main_thread())]
    if launch.count() > 1 or (status > SIGNALLED and at_work):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
