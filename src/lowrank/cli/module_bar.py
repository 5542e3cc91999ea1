"""A bar for work that goes module by module: on a terminal only, on standard error."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lowrank.adapters.each_module import silent


@contextmanager
def module_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (modules done, modules in all) to call while the block runs."""
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, count: bar.update(task, completed=done, total=count)
