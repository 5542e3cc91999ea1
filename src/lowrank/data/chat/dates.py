"""A chat template that writes the date of the day writes one date for a whole run, and for whoever asks its adapter.

transformers gives templates `strftime_now(format)`. Called with a format that is written out, as the templates of real
models do, it is replaced by the text it gives at the beginning of the run's day; a format that is computed is left.
"""

import re
from datetime import datetime

CALL = re.compile(r"""strftime_now\s*\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")
ANY_CALL = re.compile(r"strftime_now\s*\(")


def writes_date(template: str) -> bool:
    """Whether the template asks what day it is."""
    return ANY_CALL.search(template) is not None


def dated(template: str, date: str) -> str:
    """The template with what it writes on this day (YYYY-MM-DD), as it is without one."""
    if not date:
        return template
    day = datetime.fromisoformat(date)
    return CALL.sub(lambda call: repr(day.strftime(call[1] or call[2] or "")), template)
