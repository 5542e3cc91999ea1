"""Several processes of one training speak with one voice: the first one says how it goes, and an end is said once."""

import os
import signal
import sys
import time
from datetime import timedelta

from lowrank import launch

TOLD = "lowrank/told"
WAIT = timedelta(seconds=5)
PRECEDENCE = 3.0  # seconds


def tells_the_end(lost: bool = False) -> bool:
    """Whether this process is the one to say how it ended: the first that asks. True for a process that is alone.

    lost: it ends because another one did, which goes before it. The launcher ends all that are left: what there is to
    say is said before. Its store decides, which outlives the processes; without it, or before torch is there (wrong
    calls, which all find alike), the first process is the one.
    """
    if launch.count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if lost:
        time.sleep(PRECEDENCE)
    if launch.count() == 1 or launch.lacking() or "torch" not in sys.modules:
        return launch.is_first()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=WAIT)
        return int(store.add(f"{TOLD}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1)) == 1
    except (RuntimeError, ValueError):
        return launch.is_first()
