"""The training loop: steps over batches, evaluations between them, all that changes in one state."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NoReturn

import torch
from torch import nn

from lowrank.data.batches import batches_from, chunks
from lowrank.data.examples import Example, lengths_of
from lowrank.errors import Diverged, LowrankError
from lowrank.injection.dead import complaint, without_gradient
from lowrank.stages import stage
from lowrank.train.culprits import culprits, named
from lowrank.train.evaluation import Measure, score
from lowrank.train.lockstep import idle_passes
from lowrank.train.loop_state import Interval, LoopState
from lowrank.train.memory import peak_memory
from lowrank.train.optimiser import Optimiser, factors_b
from lowrank.train.patience import out_of_patience
from lowrank.train.processes import add_up, share, summed, summed_float
from lowrank.train.reporting import Progress, Reporter, Sample
from lowrank.train.schedule import rate_factor
from lowrank.train.settings import LoopSettings, StepSettings
from lowrank.train.state.randomness import seeded
from lowrank.train.watch import Watch


def steps_of(settings: StepSettings, rows: int) -> int:
    """How many steps the settings mean for so many rows: `steps`, or `epochs` passes over the rows."""
    if settings.steps is not None:
        return settings.steps
    epochs = 1.0 if settings.epochs is None else settings.epochs
    return max(1, math.ceil(epochs * math.ceil(rows / settings.batch_size)))


@dataclass(slots=True)
class Loop:
    """One training: `run()` trains what requires gradients in `model`, in place."""

    model: nn.Module
    examples: Sequence[Example]
    held_out: Sequence[Example]
    measure: Measure
    settings: LoopSettings
    reporter: Reporter
    watch: Watch = field(default_factory=Watch)
    samples: Callable[[], Sequence[Sample]] = tuple
    state: LoopState = field(init=False)
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.state = LoopState(Optimiser(trained, self.settings, factors_b(self.model)))
        self.steps = steps_of(self.settings, len(self.examples))

    def run(self) -> LoopState:
        """Take all steps, and leave the model in evaluation mode.

        Stops where `patience` evaluations in a row were no better. With it, or with `keep="best"`, the weights of the
        best evaluation are put back at the end. Raises Diverged, naming the step, where the loss, the gradient or an
        evaluation is not finite, and LowrankError, before the first step is taken, where no gradient reaches an
        adapter.
        """
        state = self.state
        self._settle()  # before the first step; where a run goes on, what it had not come to
        self.model.train()
        for numbers in self._batches():
            if out_of_patience(state.evaluations, self.settings.patience):
                break
            stage("training", state.step, self.steps)
            rate = self._step(numbers)
            self.reporter.stepped(state.step)
            if state.step % self.settings.log_every == 0 or state.step == self.steps:
                self._report(rate)
            self._settle()
        self.model.eval()
        self._restore_best()
        return state

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, batch in it) of the next step."""
        return divmod(self.state.step, math.ceil(len(self.examples) / self.settings.batch_size))

    def _batches(self) -> Iterator[Sequence[int]]:
        """The numbers of the examples in each step that is left."""
        settings, rows = self.settings, self.examples
        lengths = lengths_of(rows) if settings.group_by_length else None
        order = batches_from(self.state.step, len(rows), settings.batch_size, settings.seed, lengths)
        return islice(order, self.steps - self.state.step)

    def _step(self, numbers: Sequence[int]) -> float:
        """One step; returns the learning rate it was taken at."""
        began = time.monotonic()
        settings, state = self.settings, self.state
        rows = [self.examples[i] for i in numbers]
        own = share(rows)
        count = summed(self.measure.count(own))
        total = self._backward(own, count)
        self._idle(rows)
        total = summed_float(total)
        add_up(state.optimiser.parameters)
        if state.step == 0 and (dead := without_gradient(self.model)):
            raise LowrankError(complaint(dead))
        factor = rate_factor(settings.schedule, state.step, self.steps, round(settings.warmup * self.steps))
        factor *= 0.5**state.halvings
        norm = state.optimiser.step(factor)
        state.step += 1
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._diverged(numbers, rows, total / count, norm)
        read = sum(len(example.ids) for example in rows)
        state.trained += count
        state.tokens += read
        interval = state.interval
        interval.total += total
        interval.trained += count
        interval.tokens += read
        interval.seconds += time.monotonic() - began
        return state.optimiser.rate * factor

    def _backward(self, rows: Sequence[Example], count: int) -> float:
        """Gradients of the mean loss over the `count` things trained in these rows; returns the summed loss.

        Every micro-batch's sum is divided by the count of the whole step, so the gradient does not depend on how the
        step was cut up.
        """
        totals = []
        for part in chunks(rows, self.settings.micro_batch or self.settings.batch_size):
            loss = self.measure.loss(self.model, self.measure.trained(part))
            torch.autograd.backward(loss.total / count)
            totals.append(loss.total.detach())
        return float(torch.stack(totals).sum()) if totals else 0.0  # more processes than rows

    def _idle(self, rows: Sequence[Example]) -> None:
        """Passes that change nothing, where other processes wait for this one, which has none of the rows left."""
        for _ in range(idle_passes(self.model, len(rows), self.settings.micro_batch or self.settings.batch_size)):
            with seeded(0):
                loss = self.measure.loss(self.model, self.measure.collate(rows[:1]))
                torch.autograd.backward(loss.total * 0.0)

    def _diverged(self, numbers: Sequence[int], rows: Sequence[Example], loss: float, norm: float) -> NoReturn:
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        where = named(self.watch, numbers, culprits(self.model, self.measure, rows))
        raise Diverged(
            f"step {self.state.step}: {what}{where}, so nothing more can be learned, and {self.watch.saved()}; try a "
            "smaller --lr, a longer --warmup, or --dtype float32"
        )

    def _report(self, rate: float) -> None:
        interval, self.state.interval = self.state.interval, Interval()
        speed = interval.tokens / max(interval.seconds, 1e-9)
        mean = interval.total / interval.trained
        memory = peak_memory(next(self.model.parameters()).device)
        self.reporter.progressed(Progress(self.state.step, mean, rate, speed, self.state.trained, memory))

    def _settle(self) -> None:
        """What is due between two steps."""
        state = self.state
        every = self.settings.eval_every or math.ceil(self.steps / 5)
        due = state.step % every == 0 or state.step == self.steps
        if self.held_out and due and not state.evaluated:
            with self.watch.evaluating():
                self._evaluate()
        self.watch.between(self)

    def _evaluate(self) -> None:
        settings, state = self.settings, self.state
        scores = score(self.model, self.held_out, self.measure, settings.micro_batch or settings.batch_size)
        _check_evaluation(state.step, scores.loss, self.watch.saved())
        written = self.samples()  # before the evaluation is done: a signal may end it here
        state.evaluations.append((state.step, scores))
        if (settings.keep == "best" or settings.patience) and state.best == (state.step, scores):
            state.best_weights = [p.detach().clone() for p in state.optimiser.parameters]
        self.reporter.evaluated(state.step, scores)
        if written:
            self.reporter.sampled(state.step, written)

    @torch.no_grad()
    def _restore_best(self) -> None:
        if self.state.best_weights is not None:
            for parameter, kept in zip(self.state.optimiser.parameters, self.state.best_weights, strict=True):
                parameter.copy_(kept)


def _check_evaluation(step: int, loss: float, saved: str) -> None:
    """Said at once: the best of numbers among which one is none cannot be told, and run.json cannot hold it."""
    if not math.isfinite(loss):
        where = "before the first step" if step == 0 else f"after step {step}"
        raise Diverged(
            f"{where}: the loss on the evaluation rows is {loss}, so no training can be judged by it, and "
            f"{saved}; try --dtype float32, or look for the row by evaluating halves of the file"
        )
