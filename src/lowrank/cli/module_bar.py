"""A bar for work that goes module by module, on a terminal; elsewhere the pulse says where it is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lowrank.cli.pulse import muted
from lowrank.stages import stage


@contextmanager
def module_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (modules done, modules in all) to call while the block runs."""
    if not sys.stderr.isatty():
        yield lambda done, count: stage(description, done, count)
        return
    from rich.console import Console
    from rich.progress import Progress

    with muted(), Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None, visible=False)
        yield lambda done, count: bar.update(task, completed=done, total=count, visible=True)
