"""Module paths of a file that are those of the model but for what stands in front of them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lowrank.injection.patterns import matches_name


@dataclass(frozen=True, slots=True)
class Renaming:
    """The file's paths begin with `old` where the model's begin with `new`; paths that both have stay as they are."""

    old: str = ""
    new: str = ""
    known: frozenset[str] = frozenset()

    def __call__(self, path: str) -> str:
        """The model's path for the file's."""
        if self.old == self.new or path in self.known or not path.startswith(self.old):
            return path
        return self.new + path.removeprefix(self.old)

    def keeps_layers(self) -> bool:
        """False where a layer would become another one: `layers.1.` is not a prefix that may be exchanged."""
        numbered = any(part.isdigit() for part in self.old.split("."))
        return not numbered and (not self.old or not any(part.isdigit() for part in self.new.split(".")))

    def __str__(self) -> str:
        """For a report."""
        return f"{self.old or '(nothing)'} → {self.new or '(nothing)'}"


def lies_in(path: str, names: Iterable[str]) -> bool:
    """True where the module at `path`, or one around it, is what one of `names` means, exactly or as a suffix."""
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(matches_name(root, name) for name in names for root in around)


def find_renaming(paths: Iterable[str], model_paths: Collection[str]) -> Renaming:
    """The one change of a leading part that takes every file path to a module; no change where there is no such one.

    Candidates come from one unmatched path: each of its endings that also ends a path of the model. A candidate counts
    only if it works for all unmatched paths, takes no two paths to one module, and moves no layer. The longest common
    ending decides; where two candidates share it (an encoder and a decoder of the same make), nothing is renamed.
    """
    known, every = frozenset(model_paths), frozenset(paths)
    unmatched = sorted(every - known)
    parts = unmatched[0].split(".") if unmatched else []
    for cut in range(len(parts)):
        old, tail = ".".join([*parts[:cut], ""]), ".".join(parts[cut:])
        ends = [path.removesuffix(tail) for path in known if path == tail or path.endswith("." + tail)]
        candidates = [Renaming(old, new, known) for new in ends]
        found = [candidate for candidate in candidates if _works(candidate, every)]
        if found:
            return found[0] if len(found) == 1 else Renaming()
    return Renaming()


def _works(candidate: Renaming, paths: frozenset[str]) -> bool:
    if not candidate.keeps_layers() or not all(candidate(path) in candidate.known for path in paths):
        return False
    return len({candidate(path) for path in paths}) == len(paths)
