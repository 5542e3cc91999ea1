"""The live part of a training's panel on a terminal: the bar, and under it what the last reports said."""

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lowrank.cli.say import styled
from lowrank.train.reporting import Progress as StepProgress
from lowrank.train.views.smoothing import Smoothed
from lowrank.train.views.spark import spark


class LiveRun:
    """Drawn anew where it stands, ten times a second; lines that are printed meanwhile go above it."""

    def __init__(self, console: Console, steps: int) -> None:
        self.bar = Progress(
            TextColumn("steps"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("steps", total=steps)
        self.mean, self.losses = Smoothed(), list[float]()
        self.figures: dict[str, str] = {}
        self.evaluation = ""
        self.live = Live(self, console=console, refresh_per_second=10)

    def start(self) -> None:
        """Show it."""
        self.live.start()

    def stop(self) -> None:
        """Leave it as it is."""
        self.live.stop()

    def stepped(self, step: int) -> None:
        """The bar moves on."""
        self.bar.update(self.task, completed=step)

    def progressed(self, progress: StepProgress) -> None:
        """The figures of a report."""
        self.losses.append(progress.loss)
        self.figures = {
            "loss": f"{progress.loss:.4f}, smoothed {self.mean.add(progress.loss):.4f}  {spark(self.losses)}",
            "rate": f"{progress.rate:.2e}",
            "speed": f"{progress.tokens_per_second:,.0f} tokens/s, {progress.trained:,} trained",
            "memory": f"{progress.memory / 1e9:.2f} GB at the most",
        }

    def __rich__(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        last = {"evaluation": self.evaluation} if self.evaluation else {}
        for what, value in (self.figures | last).items():
            grid.add_row(styled(what, "bold"), styled(value))
        return Group(self.bar, grid)
