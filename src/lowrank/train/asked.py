"""What a user asked for that has no sense for the rows there are, said before a model is loaded."""

from lowrank.data.dataset import Dataset
from lowrank.data.rows import JUDGES
from lowrank.errors import ConfigError
from lowrank.train.settings import TrainSettings
from lowrank.train.text_metrics import check_metrics


def check_kind(settings: TrainSettings, rows: Dataset) -> None:
    """Raise ConfigError for settings that rows of this kind give no sense."""
    if rows.kind == "preference" and settings.full:
        raise ConfigError(
            f"--full: {rows.path} has rows of preference, which are learned against the model without its adapter; "
            "leave --full out"
        )
    check_metrics(rows.kind, settings.metrics)
    if rows.kind in JUDGES and settings.sample_prompts:
        raise ConfigError(
            f"--sample-prompts: {rows.path} has rows of {rows.kind}, and what is trained on them writes no answers; "
            "leave it out"
        )
    if rows.kind != "preference" and settings.beta is not None:
        raise ConfigError(
            f"--beta {settings.beta:g}: {rows.path} has rows of {rows.kind}, and only preferences (chosen, rejected) "
            "have a beta"
        )
