"""Materializing: a self-contained copy of the bytes that a checkpoint needs, and of no others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tailor_dcp.base import Base, open_base
from tailor_dcp.blob_copier import BlobCopier, DamagedCheckpointError, Source, Tally
from tailor_dcp.companions import files_of
from tailor_dcp.errors import TailorError
from tailor_dcp.inspection import unit_records
from tailor_dcp.layout import NewFile, Plan, lay_out
from tailor_dcp.lineage import new_save_id
from tailor_dcp.live_bytes import blob_size, checked_sizes, live_blobs, source_of, stretch_of
from tailor_dcp.location import METADATA
from tailor_dcp.metadata.compose import StorageData
from tailor_dcp.metadata.record import ATTRIBUTE, Record
from tailor_dcp.new_folder import MaterializeError, NewFolder, new_folder, opened
from tailor_dcp.ranges import Advance
from tailor_dcp.ranks import Ranks
from tailor_dcp.raw_stretch import is_raw
from tailor_dcp.stores import is_remote, place, same_store

LARGEST_FILE = 4 << 30
"""Bytes after which a new file is begun; a blob is never split."""
_THREADS = 4

Progress = Callable[[int, int], None]
_T = TypeVar("_T")

__all__ = ["DamagedCheckpointError", "MaterializeError", "Materialized", "materialize", "new_folder"]


@dataclass(frozen=True)
class Materialized:
    """What was copied.

    Attributes:
        path: the new checkpoint's folder.
        bytes: bytes of its data files.
        files: how many these are.
        blobs: how many stretches of bytes were copied.
        checked: how many of these had a checksum, which agreed.
    """

    path: str
    bytes: int
    files: int
    blobs: int
    checked: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return asdict(self)


def materialize(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    verify: bool = True,
    largest_file: int = LARGEST_FILE,
    progress: Progress | None = None,
    threads: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> Materialized:
    """Copy what a checkpoint needs into a folder that needs no other.

    Only live bytes are copied, and what lies together in one go. The new checkpoint is a save of its
    own that remembers the origins; plain ``dcp.load`` reads it, also where the input is linked to another program's
    files: every raw stretch becomes a blob of DCP's. It appears under its name when it
    is complete, and the input is never changed. Either of both may be in an object store.

    Locally the kernel copies (``copy_file_range``); where the file system can share blocks, or the store copy
    objects, files that are live as a whole are copied so, and none of their bytes are moved.

    Where ``torch.distributed`` is initialised all ranks must call this: each copies a part, and all return or raise
    the same.

    Args:
        checkpoint: the folder to copy from, or its URL.
        out: the folder to make, or its URL; it must not exist.
        verify: check each blob against its checksum, which the record of a ``LayerwiseWriter``'s save has, and
            ``torch.save``'s archives have of each tensor; and note a checksum of each.
            Without it no byte is looked at, and known checksums are carried over.
        largest_file: bytes after which a new file is begun.
        progress: is told how many of how many bytes are done; under several ranks, of this one's.
        threads: that copy, each a file at a time; None for four, or as many as there are cores for each local rank.
            Each takes up to 1 MiB of memory between local files, and some 100 MiB to or from a store.
        process_group: the ranks that share the work, where these are not all.
        no_dist: copy everything in this process, whatever ``torch.distributed`` is.

    Raises:
        MaterializeError: ``out`` exists, or cannot be written.
        NoCheckpointError: ``checkpoint`` is not committed.
        UnreadableMetadataError: its ``.metadata`` is damaged, or names files outside of its run.
        DamagedCheckpointError: a file is missing, too short or changed, or a checksum differs.
        RankLostError: another rank is gone.
    """
    ranks = Ranks(process_group, alone=no_dist)
    return _materialize(
        ranks, lambda: _asked(checkpoint, out), _Manner(verify, largest_file, threads or cores(), progress)
    )


def materialize_base(
    base: Base,
    target: Path,
    companions: Mapping[str, Path],
    verify: bool = True,
    largest_file: int = LARGEST_FILE,
    progress: Progress | None = None,
) -> Materialized:
    """Copy, in this process, what a checkpoint needs that may so far be nowhere but in memory; see ``materialize``.

    Args:
        base: the checkpoint.
        target: the folder to make.
        companions: the files that it carries along.
        verify: see ``materialize``.
        largest_file: see ``materialize``.
        progress: see ``materialize``.
    """
    manner = _Manner(verify, largest_file, cores(), progress)
    return _materialize(Ranks(alone=True), lambda: _Asked(base, target, companions), manner)


class _Asked(NamedTuple):
    """What is to be copied; only the first rank knows."""

    base: Base
    target: Path
    companions: Mapping[str, Path]


class _Manner(NamedTuple):
    """How it is copied."""

    verify: bool
    largest_file: int
    threads: int
    progress: Progress | None


class _Job(NamedTuple):
    """What every rank is told.

    Attributes:
        target: the folder to make.
        save_id: of what it holds.
        files: each rank's, to write.
        sources: the files that they are written from, by name.
    """

    target: Path
    save_id: str
    files: list[list[NewFile]]
    sources: Mapping[str, Source]


def _asked(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> _Asked:
    target = _written(out, lambda: new_folder(out))
    base = open_base(place(checkpoint))
    return _Asked(base, target, files_of(base.location.folder))


def cores() -> int:
    """Return how many threads are worth their while on this rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _materialize(ranks: Ranks, asked: Callable[[], _Asked], manner: _Manner) -> Materialized:
    """Copy with all ranks; the first one decides what, begins and commits."""
    first = _First(ranks, asked, manner)
    folder: NewFolder | None = None
    try:
        job = ranks.first(first.plan)
        folder = first.folder or opened(job.target, job.save_id)
        mine = job.files[ranks.rank]
        advance = _advance(sum(new.size for new in mine), manner.progress)
        copier = BlobCopier(job.sources, folder, manner.verify, advance)
        tallies = ranks.each(lambda: _written(job.target, lambda: copier.copy(mine, manner.threads)))
        return ranks.first(lambda: first.commit(tallies))
    except BaseException:
        discarded = first.folder or folder
        if discarded is not None:
            discarded.discard()
        raise
    finally:
        if first.folder is not None:
            first.folder.end()


class _First:
    """What the first rank does alone. ``folder`` is the one that it has begun."""

    def __init__(self, ranks: Ranks, asked: Callable[[], _Asked], manner: _Manner) -> None:
        self._ranks, self._ask, self._manner = ranks, asked, manner
        self.folder: NewFolder | None = None

    def plan(self) -> _Job:
        """Check what can be checked, and deal the work."""
        self._asked = self._ask()
        base, target, _ = self._asked
        blobs = live_blobs(base)
        sources = {name: source_of(base, name) for name in dict.fromkeys(blob.stretch.file for blob in blobs)}
        found = checked_sizes(blobs, sources)
        folder = opened(target, new_save_id())
        self.folder = folder
        _written(target, folder.begin)
        whole = found if _written(target, lambda: folder.shares([one.path for one in sources.values()])) else {}
        if is_remote(target):
            whole = {name: size for name, size in whole.items() if same_store(sources[name].path, target)}
        prefix = f"__{{rank}}_{folder.save_id[:8]}_"
        blobs = [blob._replace(size=blob_size(blob.stretch)) for blob in blobs]
        plan = Plan(prefix, self._ranks.count, self._manner.threads, self._manner.largest_file, whole)
        self._job = _Job(target, folder.save_id, lay_out(blobs, plan), sources)
        return self._job

    def commit(self, tallies: Sequence[Tally]) -> Materialized:
        """Make the checkpoint appear."""
        base, target, companions = self._asked
        assert self.folder is not None
        tally = Tally()
        for one in tallies:
            tally.add(one)
        files = [new for share in self._job.files for new in share]
        metadata = _metadata(base, target, self.folder.save_id, files, tally.crcs)
        folder = self.folder
        _written(target, lambda: folder.commit(metadata, companions))
        size, count = sum(new.size for new in files), sum(len(new.blobs) for new in files)
        return Materialized(str(target), size, len(files), count, tally.checked)


def _written(target: str | os.PathLike[str], do: Callable[[], _T]) -> _T:
    """Do something that writes, and say so if it cannot.

    Raises:
        MaterializeError: naming the target.
    """
    try:
        return do()
    except OSError as error:
        if isinstance(error, TailorError):
            raise
        raise MaterializeError(f"{os.fspath(target)} cannot be written: {error.strerror or error}.") from error


def _advance(total: int, progress: Progress | None) -> Advance:
    done, lock = 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress:
                progress(min(done, total), total)  # frames are no part of what is copied

    return advance


# Writing it down --------------------------------------------------------------------------


def _metadata(
    base: Base, target: Path, save_id: str, files: Sequence[NewFile], crcs: dict[str, dict[int, int]]
) -> Metadata:
    old = base.metadata
    places = {
        blob.stretch: _StorageInfo(new.name, at, blob.size)
        for new in files
        for blob, at in zip(new.blobs, new.places, strict=True)
    }
    moved: StorageData = {}
    for index, info in ((index, info) for blobs in base.blobs.values() for index, info in blobs):
        transforms = None if is_raw(info) else info.transform_descriptors
        moved[index] = replace(places[stretch_of(index, info, old)], transform_descriptors=transforms)
    modules = old.storage_meta.modules if old.storage_meta else []
    metadata = Metadata(
        state_dict_metadata=old.state_dict_metadata,
        planner_data=old.planner_data,
        storage_data=moved,
        storage_meta=StorageMeta(checkpoint_id=str(target), save_id=save_id, modules=list(modules)),
        version=old.version,
    )
    record = _record(base, save_id, crcs)
    if record is not None:
        setattr(metadata, ATTRIBUTE, record.to_builtins())
    return metadata


def _record(base: Base, save_id: str, crcs: dict[str, dict[int, int]]) -> Record | None:
    """Return the record: a save of its own that has copied everything and remembers where it comes from."""
    if not base.save_id:
        return None  # an old torch's, whose saves have no names: nothing could refer to it
    old = base.record or Record(
        save_id=base.save_id,
        step=base.origin.step,
        index=base.origin.nth,
        time=(base.location.folder / METADATA).stat().st_mtime,
        policy="full",
        carry="copy",
        parent=None,
        units=unit_records(base),
    )
    # The time stays: it holds an old state, and among the checkpoints of a run must not pass for the newest.
    # What was only put together in memory is nobody's parent: what it came from is.
    parent = old.parent if base.files else base.origin
    return replace(old, save_id=save_id, carry="copy", parent=parent, crcs=crcs, marks={})
