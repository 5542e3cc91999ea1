"""The tasks of the paper that fit here, and the trainings on each that its tables are read from."""

from dataclasses import dataclass, field, replace

from common import DATA, STORIES, Result, minilm

QV = "query,value"
RATES = (5e-4, 2e-3, 8e-3)  # tried for every job that says nothing else


@dataclass(frozen=True)
class Job:
    """One way to train. changes: settings of its own; rates: the learning rates that are tried."""

    changes: Result
    rates: tuple[float, ...] = RATES


@dataclass(frozen=True)
class Task:
    """model, data: what is trained on what; metric: of the score; settings: of every training.

    scored: the rows that the finished training is scored on; tuning_share: of the training rows, to choose a rate by.
    """

    model: str
    metric: str
    settings: Result
    scored: Result
    tuning_share: float
    jobs: dict[str, Job] = field(default_factory=dict)


FULL = Job({"full": True}, (3e-5, 1e-4, 3e-4))
# A scale of 0 keeps ΔW at 0, so only the classifier's head learns.
FROZEN = Job({"targets": QV, "rank": 1, "alpha": 0.0}, (2e-3, 1e-2, 5e-2))


def adapter(targets: str, rank: int) -> Job:
    """LoRA, α = 2r."""
    return Job({"targets": targets, "rank": rank})


def tasks() -> dict[str, Task]:
    """By name. In each, what the first claims need stands first."""
    glue = DATA / "glue"
    short = {"batch_size": 16, "max_length": 64, "group_by_length": True}
    ranks = {f"qv-r{rank}": adapter(QV, rank) for rank in (8, 1, 64, 4, 2)}
    single = {f"{name[0]}-r8": adapter(name, 8) for name in ("query", "value", "key")}
    return {
        "sst2": Task(
            str(minilm()),
            "accuracy",
            {"data": str(glue / "SST-2/train.tsv"), "text_column": "sentence", "steps": 200, **short},
            {"eval_data": str(glue / "SST-2/dev.tsv")},
            0.01,
            {"full": FULL, "frozen": FROZEN, **ranks, **single},
        ),
        "cola": Task(
            str(minilm()),
            "matthews",
            {
                "data": str(glue / "CoLA/train.tsv"),
                "header": False,
                "text_column": "4",
                "label_column": "2",
                "steps": 1200,  # for some 500 steps of 16, every training calls all sentences acceptable
                **short,
            },
            {"eval_data": str(glue / "CoLA/dev.tsv")},
            0.08,
            {
                "full": replace(FULL, rates=(1e-4, 3e-4)),
                "qv-r8": replace(adapter(QV, 8), rates=(5e-4, 1e-3, 2e-3, 4e-3)),
                "frozen": replace(FROZEN, rates=(1e-2, 5e-2)),
            },
        ),
        "e2e": Task(
            str(STORIES),
            "bleu",
            {
                "data": str(DATA / "e2e/trainset.csv"),
                "prompt_column": "mr",
                "completion_column": "ref",
                "steps": 200,
                "batch_size": 32,
                "group_by_length": True,
            },
            {},
            0.01,
            {
                "full": Job({"full": True}, (1e-3, 3e-3, 1e-2)),
                "all-r8": Job({"targets": "all-linear", "rank": 8}, (3e-3, 1e-2, 3e-2)),
                "qv-r8": Job({"targets": "q_proj,v_proj", "rank": 8}, (3e-3, 1e-2, 3e-2)),
            },
        ),
    }
