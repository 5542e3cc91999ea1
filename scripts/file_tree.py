"""Write the README's map of the house: every folder of src/lowrank with the first sentence of its docstring.

    python scripts/file_tree.py            # rewrites the part of README.md between the two markers
    python scripts/file_tree.py --check    # exits with 1 where the README is behind

What a file is, its own first line says. A test runs the check, so the map stays true.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- map of the folders: scripts/file_tree.py writes this -->", "<!-- end of the map -->"


def phrase(file: Path) -> str:
    """The first sentence of a module's docstring, on one line, without its full stop."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z\d)`”\"])\. (?=[A-Z])", text)[0].rstrip(".")


def folders(root: Path) -> list[str]:
    """One line a folder that holds modules, a folder before those in it."""
    lines = []
    for package in sorted(root.rglob("__init__.py"), key=lambda file: file.parent.parts):
        inside = package.parent.relative_to(root).parts
        name = f"{'  ' * len(inside)}{package.parent.name}/"
        lines.append(f"{name:<24} {phrase(package)}")
    return lines


def render(readme: str) -> str:
    """The README with today's map."""
    before, rest = readme.split(START)
    after = rest.split(END)[1]
    block = "\n".join(["```text", *folders(ROOT / "src" / "lowrank"), "```"])
    return f"{before}{START}\n{block}\n{END}{after}"


def main() -> int:
    """Rewrite the README, or with --check say whether it is behind."""
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    wanted = render(readme)
    if "--check" in sys.argv:
        if readme != wanted:
            print("README.md: the map is behind; run python scripts/file_tree.py", file=sys.stderr)
        return int(readme != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
