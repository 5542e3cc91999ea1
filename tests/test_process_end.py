"""The end of the process: nobody who wants to leave waits for work that goes on."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from lowrank.data.encoding import Encoding
from lowrank.data.readers.arrow import read_arrow, read_parquet
from lowrank.errors import LowrankError

AT_WORK = """
import threading
from lowrank import __main__ as entry
def main():
    threading.Thread(target=threading.Event().wait, args=({seconds},)).start()
    print("said")
    return {status}
entry.main = main
entry.run()
print("never")
"""


@pytest.mark.parametrize(("status", "seconds"), [(143, 600), (130, 600), (2, 0.1), (0, 0.1)])
def test_a_command_that_a_signal_ended_waits_for_no_thread(status, seconds):
    program = AT_WORK.format(status=status, seconds=seconds)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (status, "said\n"), done.stderr


class Parts(Encoding):
    """Two parts: the first is interrupted, or fails, while the second is at work."""

    def __init__(self, error):
        self.data = SimpleNamespace(speaks=False, kind="text")
        self.tokenizer = lambda *_, **__: None
        self.tokenizer.is_fast = True
        self.error, self.begun, self.go_on, self.done = error, threading.Event(), threading.Event(), False

    def _part(self, rows):
        if rows == "first":
            assert self.begun.wait(60)
            raise self.error
        self.begun.set()
        self.go_on.wait(60 if isinstance(self.error, KeyboardInterrupt) else 0.05)
        self.done = True


@pytest.mark.parametrize(("error", "waits"), [(KeyboardInterrupt(), False), (LowrankError("no"), True)])
def test_an_interruption_waits_for_no_part_and_an_error_does(error, waits):
    parts = Parts(error)
    try:
        with pytest.raises(type(error)):
            list(parts._run(["first", "second"]))
        assert parts.done == waits
    finally:
        parts.go_on.set()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
@pytest.mark.parametrize("read", [read_parquet, read_arrow])
def test_a_table_that_is_a_pipe_is_refused(read, tmp_path):
    pipe = tmp_path / "rows.parquet"
    os.mkfifo(pipe)
    with pytest.raises(LowrankError, match="no regular file but a pipe"):
        read(pipe, True)
