"""Write the README's file tree: every source file with the first sentence of its docstring.

    python scripts/file_tree.py            # rewrites the part of README.md between the two markers
    python scripts/file_tree.py --check    # exits with 1 where the README is behind

A test runs the check, so the tree stays true.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- file tree: scripts/file_tree.py writes this -->", "<!-- end of file tree -->"


def phrase(file: Path) -> str:
    """The first sentence of a module's docstring, on one line, without its full stop."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[a-z\d)`”\"])\. (?=[A-Z])", text)[0].rstrip(".")


def tree(root: Path) -> list[str]:
    """One line a file, folders before what is in them."""
    lines = []
    for file in sorted(root.rglob("*.py"), key=_order):
        inside = file.relative_to(root)
        depth = len(inside.parts) - 1
        if file.name == "__init__.py":
            name = f"{'  ' * max(depth - 1, 0)}{'/'.join(inside.parts[:-1][-1:]) or root.name}/"
        else:
            name = f"{'  ' * depth}{file.stem}"
        lines.append(f"{name:<28} {phrase(file)}")
    return lines


def _order(file: Path) -> tuple[str, ...]:
    """A folder's __init__ first, then its files, then its folders."""
    parents = [f"1{part}" for part in file.parts[:-1]]
    return (*parents, "" if file.name == "__init__.py" else f"0{file.stem}")


def render(readme: str) -> str:
    """The README with today's tree."""
    before, rest = readme.split(START)
    after = rest.split(END)[1]
    block = "\n".join(["```text", *tree(ROOT / "src" / "lowrank"), "```"])
    return f"{before}{START}\n{block}\n{END}{after}"


def main() -> int:
    """Rewrite the README, or with --check say whether it is behind."""
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    wanted = render(readme)
    if "--check" in sys.argv:
        if readme != wanted:
            print("README.md: the file tree is behind; run python scripts/file_tree.py", file=sys.stderr)
        return int(readme != wanted)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
