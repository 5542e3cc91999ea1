"""The report: one HTML file that needs nothing else, neither network nor script."""

from pathlib import Path

from lowrank.analysis.columns import columns
from lowrank.analysis.inspection import Inspection
from lowrank.analysis.sections import sections
from lowrank.analysis.summary import summary
from lowrank.checkpoint.atomic import write_file

TEMPLATE = "report.html.jinja"


def write_report(inspection: Inspection, path: Path) -> None:
    """Write the report atomically, over a file that is there. Raises OutputError where that cannot be done."""
    write_file(path, render(inspection).encode())


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
