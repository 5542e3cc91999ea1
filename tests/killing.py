"""Source for processes that are to be killed: `arm(n)` lets the n-th call that changes the disk end the process."""

ARM = """
import builtins, os, signal
CALLS = "copy_file_range fdatasync fsync mkdir open pwritev rename replace rmdir truncate unlink write".split()

def arm(step):
    left = [step]
    def dying(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, dying(getattr(os, name)))
    reading = builtins.open
    writing = dying(reading)
    def opening(file, mode="r", *rest, **options):
        return (writing if set(mode) & set("wax+") else reading)(file, mode, *rest, **options)
    builtins.open = opening
"""
