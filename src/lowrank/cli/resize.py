"""`lowrank resize`: an adapter at another rank."""

from pathlib import Path

from cyclopts import App

from lowrank.adapters.resize import resize_adapter
from lowrank.cli.flags import AllowPickle, AsJson
from lowrank.cli.module_bar import module_bar
from lowrank.cli.say import say_written
from lowrank.errors import ConfigError

command = App(
    name="resize",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank resize --adapter demo-out/adapter --rank 4 --out small
  lowrank resize --adapter demo-out/adapter --energy 0.99 --out kept --json

Examples with your own:
  lowrank resize --adapter big --ranks ranks.yaml --out small

PEFT loads what is written.""",
)


@command.default
def resize(
    *,
    adapter: Path,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    ranks: Path | None = None,
    seed: int = 0,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
) -> None:
    """Give an adapter another rank: the best approximation of every change below its own, room for training above it.

    The scale s of every module stays, so lora_alpha follows the rank.

    Parameters
    ----------
    adapter
        An adapter: its folder, or its name on the Hub
    out
        The folder to make
    rank
        Of every module; with --energy, the most it may be
    energy
        The share of each change to keep, from 0 to 1; every module gets the rank that takes
    ranks
        A YAML file of rank and rank_pattern, as `lowrank rank --out` writes it
    seed
        Of the new rows of A, where the rank grows
    """
    pattern = None
    if ranks is not None:
        if rank is not None or energy is not None:
            raise ConfigError("--ranks says every module's rank, so --rank and --energy cannot be given with it")
        rank, pattern = read_ranks(ranks)
    with module_bar("resizing") as progress:
        report = resize_adapter(
            adapter,
            out,
            rank=rank,
            energy=energy,
            ranks=pattern,
            seed=seed,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    say_written(report, out, as_json)


def read_ranks(file: Path) -> tuple[int | None, dict[str, int]]:
    """(rank, rank_pattern) of a YAML file of settings, of which nothing else is looked at."""
    from lowrank.train.config_file import check, read_yaml
    from lowrank.train.settings import AdapterSettings

    written = read_yaml(file, AdapterSettings)
    found = check(
        AdapterSettings, {name: written[name] for name in ("rank", "rank_pattern") if name in written}, str(file)
    )
    if not found.model_fields_set:
        raise ConfigError(f"--ranks {file}: neither rank nor rank_pattern is in it")
    return found.rank if "rank" in written else None, found.rank_pattern
