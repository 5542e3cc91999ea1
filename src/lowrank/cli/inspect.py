"""`lowrank inspect`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

command = App(
    name="inspect",
    help_epilogue="""Examples, after `lowrank demo`:
  lowrank inspect demo-out/adapter
  lowrank inspect demo-out/adapter --model nano --html skill.html

Examples with your own:
  lowrank inspect runs/e2e-r8 --against runs/e2e-r64 --json

Only files are read: no model is built, and nothing of the adapter is changed.""",
)


@command.default
def inspect(
    adapter: Path,
    *,
    model: str | None = None,
    against: Path | None = None,
    html: Path | None = None,
    force: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
    allow_pickle: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure what an adapter learned: spectra and ranks of ΔW, beside its base, beside another adapter.

    Parameters
    ----------
    adapter
        An adapter: its folder, or its name on the Hub
    model
        Its base: a folder, a name on the Hub, or "nano"; adds ‖ΔW‖/‖W0‖, amplification and intruder dimensions
    against
        Another adapter of the same base; adds how similar the two are
    html
        A file to write the report to, with figures; it needs no network to be read
    force
        Replace the file that --html names, where there is one
    json
        Print every number as one JSON object, for a script to read
    allow_pickle
        Read the adapter_model.bin of old adapters, by torch.load(weights_only=True)
    """
    from lowrank.analysis import inspect_adapter
    from lowrank.analysis.report import write_report
    from lowrank.cli.claim import claimed_file
    from lowrank.cli.inspect_display import show
    from lowrank.cli.module_bar import module_bar

    base = _base_folder(model)
    inputs = {"adapter": adapter, "base model": base, "other adapter": against}
    with claimed_file(html, inputs, force) as place:
        with module_bar("measuring") as progress:
            inspection = inspect_adapter(adapter, base, against, allow_pickle, progress)
        if place is not None:
            write_report(inspection, place)
    show(inspection, html, json)


def _base_folder(model: str | None) -> Path | None:
    if model is None:
        return None
    from lowrank.train.models import find_model  # here, since it takes memory and time that files alone do not need

    return find_model(model)
