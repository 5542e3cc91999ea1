"""Threads that take tasks one after another, and stop together at the first failure."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Task = TypeVar("Task")
MOST_THREADS = 16


def core_count() -> int:
    """The cores this process may use, up to what a disk can keep busy."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(len(affinity(0)) if affinity else os.cpu_count() or 1, MOST_THREADS)


class _Feed(Iterator[Task]):
    """An iterator that several threads share, and that a failure ends for all of them."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks, self._lock = iter(tasks), threading.Lock()
        self.failure: BaseException | None = None

    def __next__(self) -> Task:
        with self._lock:
            if self.failure is not None:
                raise StopIteration
            return next(self._tasks)


@contextmanager
def one_core() -> Iterator[None]:
    """Arithmetic on one core in the block: shared out, small operations wait for each other longer than they take."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)


def run_tasks(
    tasks: Iterable[Task],
    make_worker: Callable[[], Callable[[Task], None]],
    threads: int,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Hand every task to one of `threads` workers; `make_worker` is called once in each thread.

    Arithmetic runs on one core per thread while this lasts. `meanwhile` is called again and again until all is done.
    The first exception of a worker, or one of `meanwhile` or the user's interrupt, ends all and is raised here.
    """
    feed = _Feed(tasks)
    cores = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(1)
        try:
            worker = make_worker()
            for task in feed:
                worker(task)
        except BaseException as error:
            feed.failure = feed.failure or error

    workers = [threading.Thread(target=work, name=f"merge-{i}", daemon=True) for i in range(threads)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            meanwhile()
            next((worker for worker in workers if worker.is_alive()), workers[0]).join(0.02)
    except BaseException as error:
        feed.failure = feed.failure or error
    finally:
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        torch.set_num_threads(cores)
    if feed.failure is not None:
        raise feed.failure
