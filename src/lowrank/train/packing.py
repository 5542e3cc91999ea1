"""Packing on one model: whether rows put end to end stay apart is measured on it, never assumed.

transformers tells packed rows apart by positions that restart, and masks attention between them. A model that carries a
state along the row (linear attention, convolutions over time) or that does not take positions has no such mask: there
the first words of a row would be read after the last ones of another.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lowrank.data.batches import Batch
from lowrank.data.packing import Packs, end_to_end, pack, parts
from lowrank.data.recipe import Recipe
from lowrank.data.rows import PER_TOKEN, Kind
from lowrank.data.tokens import Encoded, Example
from lowrank.errors import ConfigError
from lowrank.stages import stage
from lowrank.train.evaluation import Measure
from lowrank.train.head import AGREE, Head
from lowrank.train.losses import NextToken
from lowrank.train.positions import trained_positions
from lowrank.train.row_attention import attend_at_once, attend_by_rows
from lowrank.train.settings import TrainSettings
from lowrank.train.task import Loaded
from lowrank.train.tried_rows import FEW, tried_rows

REMEDY = "leave --pack out (--group-by-length pads little too)"


def packed(
    data: Encoded, kind: Kind, loaded: Loaded, measure: Measure, recipe: Recipe, settings: TrainSettings
) -> tuple[Encoded, TrainSettings]:
    """The rows in packs, tried on the model; rows that have one answer each are grouped by length instead.

    Raises ConfigError where the model lets packed rows see each other.
    """
    if kind not in PER_TOKEN:
        return data, settings.model_copy(update={"group_by_length": True})
    found = pack(data, recipe.max_length)
    head = measure.loss.head if isinstance(measure.loss, NextToken) else None
    assert isinstance(found.examples, Packs)
    check_apart(loaded.model, found.examples, measure, head)
    if len(several := found.examples.shared):
        tried = tried_rows(loaded.model, parts(found.examples[int(several[-1])]))
        attend_by_rows(loaded.model, measure.collate([end_to_end(tried)]), head)
    return found, settings


def flattened(examples: Sequence[Example], kind: Kind, loaded: Loaded, measure: Measure, batch: int) -> bool:
    """Whether rows that are trained together can lie end to end as one pack, so that nothing is padded.

    In place: attention goes by rows then, without which a pack would take longer than padded rows. Tried on the first
    rows: their logits are those of the same rows side by side, within rounding. batch: how many are trained together.
    """
    model, head = loaded.model, measure.loss.head if isinstance(measure.loss, NextToken) else None
    if kind not in PER_TOKEN or min(batch, len(examples)) < 2:
        return False
    rows = tried_rows(model, [examples[at] for at in range(min(batch, len(examples), FEW))])
    one = measure.collate([end_to_end(rows)])
    if not attend_by_rows(model, one, head):
        return False
    allowed = max(AGREE.get(p.dtype, 0.0) for p in model.parameters())
    if apart(model, one, measure.collate(rows), head) <= allowed:
        return True
    attend_at_once(model)
    return False


def check_apart(model: nn.Module, packs: Packs, measure: Measure, head: Head | None) -> None:
    """Raise ConfigError where the logits of packed rows are not those of the same rows alone, within rounding."""
    several = packs.shared
    if not len(several):
        return  # no row shares a pack
    stage("trying whether packed rows stay apart")
    chosen = [packs[int(several[0])], packs[int(several[-1])]]  # the longest rows, for windows, and many short ones
    rows = [tried_rows(model, parts(example)) for example in chosen]
    allowed = max(AGREE.get(p.dtype, 0.0) for p in model.parameters())
    try:
        one = measure.collate([end_to_end(members) for members in rows])
        other = measure.collate([row for members in rows for row in members])
        found = apart(model, one, other, head)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model says that has no positions
        reason = f"{' '.join(str(error).split()):.150}"
        raise ConfigError(f"--pack: this model does not take packed rows ({reason}); {REMEDY}") from None
    if not found <= allowed:
        raise ConfigError(
            f"--pack: on this model rows put end to end see each other, as with linear attention (the logits of a few "
            f"rows change by {found:.2g} of their size, and rounding explains {allowed:g}); {REMEDY}"
        )


@torch.no_grad()
def apart(model: nn.Module, one: Batch, other: Batch, head: Head | None) -> float:
    """max ‖x − y‖ / ‖y‖ over positions, x and y their logits in two batches that train the same tokens in order.

    Without the mean over the vocabulary, which no probability depends on. By position, since a leak shows where a row
    begins and would vanish in a mean.
    """
    was_training = model.training
    model.eval()
    try:
        mine, theirs = (trained_positions(model, head, batch, None) for batch in (one, other))
        worst = 0.0
        for at in range(0, mine.targets.numel(), mine.size):
            x, y = (p.logits_of(p.states[at : at + p.size]).float() for p in (mine, theirs))
            x, y = (logits - logits.mean(-1, keepdim=True) for logits in (x, y))
            found = ((x - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(torch.finfo(y.dtype).tiny)).max()
            worst = max(worst, float(found)) if found.isfinite() else float("nan")
    finally:
        model.train(was_training)
    return worst
