"""What train, eval and generate show: a panel and a bar on a terminal, plain lines elsewhere."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from signal import Signals
from typing import Any, Self

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from lowrank.cli.live import LiveRun
from lowrank.cli.pulse import muted, spoke
from lowrank.cli.say import say, say_part, styled
from lowrank.data.rows import PER_TOKEN
from lowrank.errors import short
from lowrank.train.evaluation import Scores
from lowrank.train.evaluator import EvalResult
from lowrank.train.reporting import Progress as StepProgress
from lowrank.train.reporting import Reporter, Sample
from lowrank.train.result import TrainResult
from lowrank.train.settings import EvalSettings, TrainSettings

PROMPT, ANSWER = 60, 400  # characters of a sample that are shown; log.jsonl has it whole
SHARES = ("accuracy", "exact_match")


class RunDisplay(Reporter):
    """Shows a run while it goes on."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.bar: LiveRun | None = None
        self.silence = ExitStack()
        self.steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.silence.close()
        if self.bar is not None:
            self.bar.stop()

    def started(self, summary: Sequence[tuple[str, str]], steps: int) -> None:
        """The panel, and the bar below it."""
        self.steps = steps
        if not self.console.is_terminal:
            self._lines([f"{what + ':':<12}{value}" for what, value in summary])
            return
        grid = Table.grid(padding=(0, 2))
        for what, value in summary:
            grid.add_row(f"[bold]{what}", styled(value))
        self.console.print(Panel(grid, title="lowrank train", title_align="left"))
        self.bar = LiveRun(self.console, steps)
        self.bar.start()
        self.silence.enter_context(muted())

    def stepped(self, step: int) -> None:
        """The bar moves on."""
        if self.bar is not None:
            self.bar.stepped(step)

    def progressed(self, progress: StepProgress) -> None:
        """The figures under the bar, or a line."""
        if self.bar is not None:
            self.bar.progressed(progress)
        else:
            figures = f"loss {progress.loss:.4f}  {progress.tokens_per_second:,.0f} tokens/s"
            more = f"rate {progress.rate:.2e}  {progress.trained:,} trained"
            self._lines([f"step {progress.step}/{self.steps}  {figures}  {more}"])

    def evaluated(self, step: int, scores: Scores) -> None:
        """A line above the bar, and the last one under it."""
        if self.bar is not None:
            self.bar.evaluation = f"step {step}: {describe(scores)}"
        self._lines([f"step {step}/{self.steps}  evaluation: {describe(scores)}"])

    def sampled(self, step: int, samples: Sequence[Sample]) -> None:
        """A line for each, above the bar."""
        at = f"step {step}/{self.steps}"
        self._lines([f"{at}  {short(one.prompt, PROMPT)} → {short(one.answer, ANSWER)}" for one in samples])

    def stopping(self, number: int) -> None:
        """By the system's own call: a signal may come in the middle of another print."""
        name = Signals(number).name
        os.write(2, f"\nlowrank: {name}: this step, then a checkpoint; once more stops at once\n".encode())

    def finished(self, result: TrainResult, settings: TrainSettings) -> None:
        """What came out, and what can be done with it."""
        lines = []
        if result.steps < self.steps:
            since = f"no lower evaluation loss in {settings.patience}"
            lines.append(f"stopped at step {result.steps} of {self.steps}: {since}")
        if result.before and result.after and result.best:
            best = f"; best {result.best[1].loss:.4f} at step {result.best[0]}"
            lines.append(f"evaluation loss {result.before.loss:.4f} before, {result.after.loss:.4f} after{best}")
        flag = f"--model {result.folder}" if settings.full else f"--model {settings.model} --adapter {result.folder}"
        if settings.quantise:  # of another form of the base the adapter answers otherwise
            flag += f" --quantise {settings.quantise}" + " --double" * settings.double
        unseen = f"--data {settings.eval_data}" if settings.eval_data else "--data FILE, of rows not trained on"
        lines += [f"saved to {result.folder}", f"next: lowrank eval {flag} {unseen}"]
        self._lines(lines)

    def _lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.console.print(styled(line), soft_wrap=True)
        spoke()


def describe(scores: Scores) -> str:
    """Scores in a line."""
    figures = "".join(f", {name.replace('_', ' ')} {shown(name, value)}" for name, value in scores.figures.items())
    return f"loss {scores.loss:.4f}{figures}, over {scores.count:,}"


def shown(name: str, value: float) -> str:
    """A share as per cent, anything else as a number."""
    return f"{value:.2%}" if name in SHARES else f"{value:.4f}"


def show_evaluation(result: EvalResult, settings: EvalSettings, as_json: bool) -> None:
    """The figures of `lowrank eval`, as lines or as one JSON object."""
    scores = result.scores
    figures: dict[str, Any] = {
        "model": settings.model,
        "adapter": settings.adapter,
        "data": settings.data,
        "kind": result.kind,
        "rows": result.rows,
        "rows_cut": result.cut,
        "rows_dropped": result.dropped,
        "loss": scores.loss,
        **scores.figures,
    }
    if result.kind in PER_TOKEN:
        figures |= {"tokens": scores.count}
    if as_json:
        say(json.dumps(figures))
        return
    width = max(14, max(map(len, figures)) + 2)
    for name, value in figures.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        say(f"{name.replace('_', ' ') + ':':<{width}}{'none' if shown is None else shown}")


@contextmanager
def stream() -> Iterator[Callable[[str], None]]:
    """A function that prints text as it comes; the line is ended when the block is."""

    yield say_part
    say("")
