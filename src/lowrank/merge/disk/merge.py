"""Merging adapters into a checkpoint on disk, from files to files."""

import json
import os
import time
import warnings as python_warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lowrank.checkpoint.outputs import check_room, claimed
from lowrank.errors import CheckpointError, LowrankWarning, MergeError, some
from lowrank.files.regular import read_bytes
from lowrank.files.safetensors import FLOATS
from lowrank.merge.apart import Apart
from lowrank.merge.disk.adapters import Adapter, WeightedAdapter, read_adapters
from lowrank.merge.disk.card import card, sha256_of
from lowrank.merge.disk.onto_original import distances
from lowrank.merge.disk.plan import MergePlan, plan_merge
from lowrank.merge.disk.progress import bar
from lowrank.merge.disk.report import MergeReport, survival_warnings
from lowrank.merge.disk.sidefiles import corrected_config, kept_from_training, side_files, write_synced
from lowrank.merge.disk.verify import Findings, verify_files
from lowrank.merge.disk.write import link_or_clone, sync_data, write_files
from lowrank.merge.onto import Onto, check_onto
from lowrank.modelfiles.base import BaseFiles, read_base
from lowrank.modelfiles.pool import MOST_THREADS, core_count, one_core
from lowrank.modelfiles.staging import staging
from lowrank.modelfiles.tensors import StoredEntry

Verify = Literal["sample", "full"]
Untouched = Literal["copy", "reflink", "hardlink"]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}


@dataclass(frozen=True, slots=True)
class _Options:
    """How to merge. dtype: the result's, None as stored; full: whether every row and byte is verified."""

    dtype: torch.dtype | None
    full: bool
    untouched: Untouched
    threads: int
    onto: Onto = "16bit"
    anyway: bool = False

    @property
    def dtype_name(self) -> str | None:
        """The word that config.json has for the dtype."""
        return None if self.dtype is None else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class _Job:
    """A merge that was found possible. place: the real path of the folder to make."""

    base: BaseFiles
    adapters: list[Adapter]
    plan: MergePlan
    place: Path
    options: _Options


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: WeightedAdapter | Sequence[WeightedAdapter],
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    verify: Verify = "sample",
    untouched: Untouched = "copy",
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: bool = False,
    onto: Onto = "16bit",
    anyway: bool = False,
) -> MergeReport:
    """Write W0 + Σ weight·s·B·A of every tensor to the new folder `out`: files alone, no model is built.

    base: a folder with safetensors weights, one file or sharded, or one weight file; adapters: folders in PEFT's
    format, or (folder, weight) pairs. The result has the bits of `merge_and_unload` on the same model in memory, at the
    speed of the disk and in little memory. Sources are only read.

    dtype: of the result's floating-point tensors ("float16", "bfloat16", "float32", "float64"; default: as stored).
    verify: "sample" recomputes some rows of every merged tensor in float64, "full" every row, and compares every byte.
    untouched: how weight files that stay as they are get into the result: "copy", or where the file system can,
        "reflink" (shared until one side is written) or "hardlink" (one file under two names: never edit it in place).
    threads: how many work at once, one for each core by default, 16 at most.
    onto: what becomes of a quantised base. "16bit": quantised weights are read as training saw them, and the result is
        plain, in the dtype of the base's other weights; those of a float base that `train --quantise` quantised are
        quantised again, one at a time. "quantised": merged weights go back into the base's own form;
        before a byte is written the share of ‖ΔW‖² that survives that is computed, weight by weight, and MergeError
        shows it where it is less than half, unless `anyway`. "original": `base` is the unquantised model that the
        adapter's base was made from; the report says how far each weight is from the one that was trained.
    allow_pickle: read an old adapter's `adapter_model.bin`, with weights_only.

    The folder gets its name when everything in it is verified and on the disk; killed before, it leaves no result.
    Warns (LowrankWarning) where rounding swallows the change. Raises CheckpointError for files that are damaged or do
    not fit, ConfigError for a weight that cannot be meant, MergeError for a merge that cannot be exact, OutputError for
    a place that cannot be written.
    """
    options = replace(_options(dtype, verify, untouched, threads), onto=onto, anyway=anyway)
    check_onto(onto)
    if onto == "quantised" and dtype is not None:
        raise MergeError("dtype cannot be given with onto quantised, which keeps the form that the base has")
    clock = _Clock()
    with one_core():
        read = read_adapters(adapters, allow_pickle)
        with _reading(base):
            files = read_base(base)
        inputs = {"base model": files.folder} | {f"adapter {adapter.folder}": adapter.folder for adapter in read}
        with claimed(out, inputs) as place:
            job = _prepare(files, read, place, options)
            far = distances(job.plan.recipes, options.threads) if onto == "original" else {}
            clock.lap("plan")
            linked, notes, findings = _run(job, clock, progress)
    report = _report(job, Path(out), linked, notes, findings, far, clock)
    for text in report.warnings:
        python_warnings.warn(text, LowrankWarning, stacklevel=2)
    return report


def _options(dtype: str | torch.dtype | None, verify: str, untouched: str, threads: int | None) -> _Options:
    if verify not in ("sample", "full"):
        raise MergeError(f'verify must be "sample" or "full", not {verify!r}')
    if untouched not in ("copy", "reflink", "hardlink"):
        raise MergeError(f'untouched must be "copy", "reflink" or "hardlink", not {untouched!r}')
    if threads is not None and threads < 1:
        raise MergeError(f"threads must be at least 1, not {threads}")
    return _Options(_dtype(dtype), verify == "full", untouched, min(threads or core_count(), MOST_THREADS))  # type: ignore[arg-type]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in FLOATS.values()):
        return dtype
    if dtype not in DTYPES:
        raise MergeError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[str(dtype)]


@contextmanager
def _reading(base: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or base} cannot be read: {error.strerror or error}") from error


def _prepare(files: BaseFiles, adapters: list[Adapter], place: Path, options: _Options) -> _Job:
    """Everything that can be found wrong before a byte is written."""
    with _reading(files.folder):
        if options.onto == "original" and any(isinstance(entry, StoredEntry) for _, entry in files.tensors.values()):
            raise MergeError(f"onto original: {files.label} is quantised itself: give the model that it was made from")
        plan = plan_merge(files, adapters, options.dtype, options.onto, options.anyway)
    new = [file for file in plan.files if options.untouched == "copy" or not file.unchanged]
    check_room(place.parent, sum(file.layout.size for file in new))
    return _Job(files, adapters, plan, place, options)


def _run(job: _Job, clock: "_Clock", progress: bool) -> tuple[tuple[str, ...], list[str], Findings]:
    """Write, verify, give the name; (files shared with the base, notes about sharing, what verification found)."""
    with bar(job.plan.nbytes, progress) as advance, staging(job.place) as folder:
        linked, notes = _write(job, folder, advance)
        clock.lap("write")
        findings = _verify(job, folder)
        clock.lap("verify")
        hashes = {file.name: sha256_of(folder / file.name) for file in job.plan.files} if job.options.full else {}
        write_synced(folder / "README.md", card(job.base, job.adapters, job.plan, findings, hashes))
    clock.lap("commit")
    return linked, notes, findings


class _Clock:
    """The seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.seconds[stage], self._since = now - self._since, now


def _write(job: _Job, folder: Path, advance: Callable[[int], None]) -> tuple[tuple[str, ...], list[str]]:
    """Everything but the card; (files shared with the base, notes about sharing that was not possible)."""
    notes = _write_side_files(job, folder)
    how = job.options.untouched
    linked, copied = [], []
    for file in job.plan.files:
        shared = how != "copy" and file.unchanged
        if shared and link_or_clone(file.shard.path, folder / file.name, how):
            linked.append(file.name)
            advance(file.layout.size)
        else:
            (folder / file.name).unlink(missing_ok=True)
            copied.append(file)
    write_files(folder, copied, job.options.threads, advance)
    missed = [file.name for file in copied if file.unchanged and how != "copy"]
    notes += [f"{some(missed)}: copied, this file system has no {how} here"] if missed else []
    return tuple(linked), notes


def _write_side_files(job: _Job, folder: Path) -> list[str]:
    """All that lies beside the weights; notes for the report."""
    for name, path in side_files(job.base):
        write_synced(folder / name, bytes(read_bytes(path)))
    kept, notes = kept_from_training(job.base, [adapter.folder for adapter in job.adapters])
    for name, content in kept.items():
        write_synced(folder / name, content)
    if job.base.config is not None:
        plain = any(recipe.was_stored for recipe in job.plan.recipes)
        config = corrected_config(job.base.config, job.options.dtype_name, job.plan.untie, plain, job.plan.words)
        if config is not None:
            write_synced(folder / "config.json", config)
    if job.base.index_name is not None:
        write_synced(folder / job.base.index_name, _index(job))
    return notes


def _index(job: _Job) -> bytes:
    """The index of the result: the base's own bytes where no tensor came, went or changed its size."""
    base, files = job.base, job.plan.files
    assert base.index is not None and base.index_name is not None
    if all(file.layout is file.shard.layout for file in files):
        return bytes(read_bytes(base.folder / base.index_name))
    table = {entry.name: file.name for file in files for entry in file.layout.entries}
    said = base.index.get("metadata")
    metadata = dict(said) if isinstance(said, dict) else {}
    metadata["total_size"] = sum(entry.nbytes for file in files for entry in file.layout.entries)
    metadata.pop("total_parameters", None)
    content = base.index | {"metadata": metadata, "weight_map": dict(sorted(table.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _verify(job: _Job, folder: Path) -> Findings:
    """Verify while the disk is still taking what was written, and wait for the disk."""
    waiting = [folder / file.name for file in job.plan.files]

    def sync_next() -> None:
        if waiting:
            sync_data(waiting.pop())

    options = job.options
    findings = verify_files(folder, job.plan.files, full=options.full, threads=options.threads, meanwhile=sync_next)
    while waiting:
        sync_next()
    return findings


def _report(
    job: _Job,
    out: Path,
    linked: tuple[str, ...],
    notes: list[str],
    findings: Findings,
    far: Mapping[str, Apart],
    clock: _Clock,
) -> MergeReport:
    recipes = job.plan.recipes
    dtypes = {recipe.dtype for recipe in recipes if recipe.contributions}
    surviving = findings.surviving | dict(job.plan.shares)
    return MergeReport(
        out=out,
        merged=sum(bool(recipe.contributions) or recipe.repacked is not None for recipe in recipes),
        replaced=sum(recipe.replacement is not None or bool(recipe.rows) for recipe in recipes) - job.plan.small_parts,
        moved=sum(recipe.moved for recipe in recipes),
        bytes=job.plan.nbytes,
        linked=linked,
        renamed=job.plan.renamed,
        notes=(*job.plan.notes, *notes),
        warnings=tuple(survival_warnings(surviving, ", ".join(sorted(dtypes)) or "the base's stored form")),
        surviving=surviving,
        rows=findings.rows,
        worst=findings.worst,
        seconds=clock.seconds,
        repacked=len(job.plan.shares),
        apart=dict(far),
    )
