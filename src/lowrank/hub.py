"""Models, adapters and data files by their names on the Hugging Face Hub, through huggingface_hub's own cache.

    org/name                   a repository, at the revision its owner calls main
    org/name@revision          the same at a branch, a tag or a commit
    org/name:train.jsonl       a file of a data set's repository; whole sets are `data.hub_sets`

What is here under that name always wins. Of a repository only safetensors, JSON and a tokenizer's files are fetched:
never code, never pickles. HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT mean what they mean to huggingface_hub.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lowrank.errors import CheckpointError, DataError
from lowrank.stages import stage

JSON = ("*.json",)
TOKENIZER = ("*.model", "*.tiktoken", "vocab.txt", "merges.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)
EVERYTHING = (*JSON, *TOKENIZER, *WEIGHTS)
NOT_WANTED = ("*/*", "consolidated*.safetensors")  # other formats' folders, and the same weights once more

_WORD = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repo>{_WORD}/{_WORD})(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+))?", re.ASCII)
_FILE_NAME = re.compile(r"\.[A-Za-z]\w*$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"(?:models|datasets)--(?P<owner>.+?)--(?P<name>.+)")


class HubId(NamedTuple):
    """A name on the Hub, read. revision: None for main; file: in a data set's repository, None for a folder."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """As it is typed."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")


def hub_id(name: str | os.PathLike[str]) -> HubId | None:
    """The name on the Hub that `name` is; None for what is here on the disk, and for what only a path can be."""
    text = os.fspath(name)
    found = _ID.fullmatch(text)
    return None if found is None or os.path.lexists(text) else HubId(**found.groupdict())


def local_folder(name: str | os.PathLike[str], files: Sequence[str] = EVERYTHING) -> Path:
    """The folder that `name` means: itself, or where the cache has the model or adapter of that name on the Hub.

    files: patterns of what is needed of it. Whether a path exists is for its reader to say. Raises CheckpointError for
    a name on the Hub that cannot be fetched.
    """
    wanted = hub_id(name)
    if wanted is None or wanted.file is not None:
        return Path(name)

    def fetch() -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            allow_patterns=list(files),
            ignore_patterns=list(NOT_WANTED),
        )

    folder = Path(_fetched(wanted, fetch, CheckpointError, "folder"))
    if files is EVERYTHING and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{wanted}: on the Hub it has no safetensors weights, and pickles are not fetched: ask its owner for them"
        )
    return folder


def cached(name: str) -> list[str]:
    """Where the cache keeps what has this name on the Hub, as a model and as a data set; nothing is fetched."""
    wanted = hub_id(name)
    if wanted is None:
        return []
    from huggingface_hub.constants import HF_HUB_CACHE

    return [os.path.join(HF_HUB_CACHE, f"{kind}--{wanted.repo.replace('/', '--')}") for kind in ("models", "datasets")]


def local_file(name: str | os.PathLike[str]) -> Path:
    """The data file that `name` means: itself, or where the cache has the file of a data set on the Hub.

    Raises DataError for one that cannot be fetched.
    """
    wanted = hub_id(name)
    if wanted is None or wanted.file is None:
        return Path(name)
    file = wanted.file

    def fetch() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(wanted.repo, file, repo_type="dataset", revision=wanted.revision)

    return Path(_fetched(wanted, fetch, DataError, "file"))


def data_set(name: str | os.PathLike[str]) -> HubId | None:
    """The whole data set on the Hub that `name` means, its configuration as the file; None for a file or a path."""
    wanted = hub_id(name)
    if wanted is None or _FILE_NAME.search(wanted.repo if wanted.file is None else wanted.file):
        return None
    return wanted


def origin(path: str | os.PathLike[str]) -> HubId | None:
    """The name and commit of what lies in the cache at `path`, a snapshot or a file in it; None for other places."""
    parts = Path(os.path.abspath(path)).parts
    for place in range(len(parts) - 2):
        found = _SNAPSHOT.fullmatch(parts[place])
        if found and parts[place + 1] == "snapshots":
            repo = f"{found['owner']}/{found['name']}"
            return HubId(repo, parts[place + 2], "/".join(parts[place + 3 :]) or None)
    return None


def pinned(name: str, path: Path) -> str:
    """`name` with the commit that was found for it at `path`, where it is a name on the Hub; else as it is."""
    wanted = hub_id(name)
    found = origin(path) if wanted else None
    if wanted and found is None and (commit := commit_of_set(path)):
        found = wanted._replace(revision=commit)
    return name if found is None else str(found)


def commit_of_set(file: Path) -> str | None:
    """The commit of a data set whose rows `datasets` keeps in `file`: the name of its folder, where that is one."""
    return file.parent.name if file.suffix == ".arrow" and is_commit(file.parent.name) else None


def is_commit(revision: str) -> bool:
    """Whether it names a commit whole: nothing else ever has that name."""
    return _COMMIT.fullmatch(revision) is not None


def _fetched(wanted: HubId, fetch: Callable[[], str], kind: type[Exception], what: str) -> str:
    """What `fetch` returns, with the Hub's refusals as one sentence of the given kind."""
    stage(f"fetching {wanted} from the Hub")
    try:
        return fetch()
    except (OSError, ValueError) as error:
        raise kind(f"{wanted}: there is no such {what} here, and {_why(error, wanted)}") from None


def _why(error: Exception, wanted: HubId) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{wanted.repo}"
    reasons: dict[type[Exception], str] = {  # the first that fits
        errors.GatedRepoError: f"on the Hub its owner lets in who asked: ask at {page}, then run `hf auth login`",
        errors.RepositoryNotFoundError: "the Hub has none of that name, or none that you may see (`hf auth login`)",
        errors.RevisionNotFoundError: f"the Hub's {wanted.repo} has no revision {wanted.revision}",
        errors.RemoteEntryNotFoundError: f"the Hub's data set {wanted.repo} has no file {wanted.file}",
        errors.IncompleteSnapshotError: "the Hub's cache has only a part of it, and the Hub cannot be reached",
        errors.LocalEntryNotFoundError: _unreachable(),
    }
    known = next((reason for kind, reason in reasons.items() if isinstance(error, kind)), None)
    return known or f"fetching it from the Hub failed: {' '.join(str(error).split()):.200}"


def _unreachable() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the Hub's cache does not hold it, while HF_HUB_OFFLINE forbids fetching it"
    return "the Hub's cache does not hold it, while the Hub cannot be reached from this machine"
