"""A bar, on a terminal, for the stages of long work that count to their end."""

from typing import Any, TextIO

ENDING = ("tokenising rows",)  # other stages that count are left for what comes next, and a bar would stay


class StageBar:
    """A bar on the stream while such a stage goes on; nothing where the stream is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._bar: Any = None

    @property
    def shown(self) -> bool:
        """Whether there is a bar now."""
        return self._bar is not None

    def told(self, what: str, done: int | None, total: int | None) -> None:
        """The stage, as `lowrank.stages` tells it."""
        if done is None or total is None or done >= total or not what.endswith(ENDING) or not self.stream.isatty():
            self.close()
            return
        if self._bar is None:
            self._bar = self._begun()
        task = self._bar.task_ids[0]
        self._bar.update(task, description=what, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _begun(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(file=self.stream), transient=True)
        bar.add_task("")
        bar.start()
        return bar
