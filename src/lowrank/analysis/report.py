"""The report: one HTML file that needs nothing else, neither network nor script."""

from pathlib import Path

from lowrank.analysis.columns import columns
from lowrank.analysis.inspection import Inspection
from lowrank.analysis.sections import sections
from lowrank.analysis.summary import summary
from lowrank.checkpoint.atomic import write_file
from lowrank.errors import LowrankError

TEMPLATE = "report.html.jinja"


def check_place(path: Path) -> None:
    """Raise LowrankError where no report can be written to `path`; better said before measuring than after."""
    if path.is_dir():
        raise LowrankError(f"{path} is a folder: give the name of a file for the report, as in {path / 'report.html'}")
    if not path.absolute().parent.is_dir():
        raise LowrankError(f"there is no folder {path.absolute().parent} to write the report to: make it first")


def write_report(inspection: Inspection, path: Path) -> None:
    """Write the report atomically. Raises LowrankError where that cannot be done; what was there is untouched then."""
    check_place(path)
    try:
        write_file(path, render(inspection).encode())
    except OSError as error:
        raise LowrankError(f"{path}: the report cannot be written ({error.strerror or error})") from error


def render(inspection: Inspection) -> str:
    """The report as text: words first, then figures, each with a line on how to read it, then every module's row."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    chosen = columns(inspection)
    return environment.get_template(TEMPLATE).render(
        name=Path(inspection.adapter).resolve().name or "adapter",
        inspection=inspection,
        sentences=summary(inspection),
        sections=sections(inspection),
        columns=chosen,
        rows=[[column.value(layer) for column in chosen] for layer in inspection.layers],
    )
