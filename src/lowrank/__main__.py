"""`python -m lowrank` is `lowrank`; of several processes each leaves as soon as it is done.

torch.distributed's threads may be at work when Python is taken down, and now and then one aborts the process for it
(SIGABRT), whose work is done and saved: a launcher would tell of a failure.
"""

import os
import sys

from lowrank import launch
from lowrank.cli import main

status = main()
if launch.count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
