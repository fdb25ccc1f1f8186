"""Copying a run to another place: what shares bytes here shares them there."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tailor_dcp.carry import make_folder, sync_folder
from tailor_dcp.census import DOOMED, unless_gone, walk
from tailor_dcp.copy_job import PARTIAL, CopyJob, CopyRefusedError, Item
from tailor_dcp.errors import NoCheckpointError, TailorError, TailorWarning
from tailor_dcp.location import METADATA, is_within
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.ranges import Advance
from tailor_dcp.stores import is_remote, place
from tailor_dcp.transfer import transfer

__all__ = ["Copied", "CopyRefusedError", "copy"]


@dataclass(frozen=True)
class Copied:
    """What was copied. All sizes in bytes.

    Attributes:
        source: the run, or the checkpoint.
        path: where it is now.
        copied: bytes copied by this call.
        linked: files that were linked instead, as their bytes were there already.
        skipped: files that an earlier call had copied.
        bytes: what the copy takes on disk as a whole.
        naive: what it would take if each name were copied for itself.
    """

    source: str
    path: str
    copied: int
    linked: int
    skipped: int
    bytes: int
    naive: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return asdict(self)


def copy(
    run: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Copied:
    """Copy a run, or one checkpoint, with everything in it; a file with several names is copied once.

    Each ``.metadata`` comes after all data, so nothing at the destination looks like a checkpoint
    that is none. A copy that was cut off is continued by the same call.

    Either of both may be in an object store, where a file has one name only. What several checkpoints share is then
    stored once, where it was first written, and the others' ``.metadata`` refer to it: by absolute keys in a store, by
    ``../step-100/…`` on a disk. So every checkpoint stays loadable with stock DCP and no byte is stored twice, but it
    needs the older folders; ``prune`` knows that. Within one store the store copies by itself. Symbolic links are
    left out.

    Args:
        run: the run's or the checkpoint's folder, or its URL.
        dst: the folder or URL to copy to: new, empty, or what an earlier call has left.
        verify: compare what an earlier call has copied byte by byte, not by size and time alone.
        progress: is told how many of how many bytes are done.

    Raises:
        NoCheckpointError: ``run`` is no folder.
        CopyRefusedError: ``dst`` holds something else, or a checkpoint needs files outside of ``run``.
        TailorError: a file cannot be read or written.
    """
    source, target = _places(run, dst)
    if is_remote(source) or is_remote(target):
        try:
            return Copied(str(source), str(target), **asdict(transfer(source, target, verify, progress)))
        except OSError as error:
            raise _cannot(error, source) from error
    try:
        items = _items(source)
    except OSError as error:
        raise _cannot(error, source) from error
    _check_references(items, source)
    items = [item for item in items if item.is_link or stat.S_ISREG(item.status.st_mode)]  # a pipe would be waited for
    job = CopyJob(source, target, verify, _advance(items, progress))
    _check_destination(items, job)
    try:
        make_folder(target)
        for item in items:
            if item.path.name != METADATA:
                job.bring(item)
        for folder, _ in walk(target):  # also what an earlier call has brought
            sync_folder(folder)
        for item in items:
            if item.path.name == METADATA:
                job.bring(item)
                sync_folder(job.destination(item).parent)
        _settle(source, target)
    except OSError as error:
        raise _cannot(error, source) from error
    sizes = {item.inode: item.size for item in items}
    naive = sum(item.size for item in items)
    return Copied(str(source), str(target), job.copied, job.linked, job.skipped, sum(sizes.values()), naive)


def _cannot(error: OSError, source: Path) -> TailorError:
    if isinstance(error, TailorError):
        return error
    return TailorError(
        f"{error.filename or source} cannot be copied: {error.strerror}; the same command goes on from here."
    )


# Before anything is written ---------------------------------------------------------------


def _places(run: str | os.PathLike[str], dst: str | os.PathLike[str]) -> tuple[Path, Path]:
    source, target = place(run), place(dst)
    if not source.is_dir():
        raise NoCheckpointError(f"{source} is no folder; name a run or a checkpoint.")
    if target.exists() and not target.is_dir():
        raise CopyRefusedError(f"{target} is a file; name a folder to copy to.")
    if is_within(target, source) or is_within(source, target):
        raise CopyRefusedError(f"{source} and {target} lie one within the other; name a place beside.")
    return source, target


def _items(source: Path) -> list[Item]:
    """Return what there is to copy: data first, then the ``.metadata`` from the oldest to the newest.

    What is committed is listed before the data: a save that ends meanwhile is left out as a whole.
    """
    committed = [Item(path, path.lstat()) for path in _files(source) if path.name == METADATA]
    items = []
    for path in _files(source):
        if path.name == METADATA or path.name.endswith((PARTIAL, f"{METADATA}.tmp")):
            continue
        try:
            status = path.lstat()
        except FileNotFoundError as error:  # the temporary file of a save under way
            unless_gone(error)
            continue
        items.append(Item(path, status))
    return items + sorted(committed, key=lambda item: item.status.st_mtime_ns)


def _files(source: Path) -> Iterator[Path]:
    for folder, paths in walk(source):
        if not any(part.startswith(DOOMED) for part in folder.relative_to(source).parts):
            yield from paths


def _check_references(items: list[Item], source: Path) -> None:
    """Refuse to copy a checkpoint without the files that it needs."""
    for item in items:
        if item.path.name != METADATA:
            continue
        try:
            names = {info.relative_path for info in read(item.path).storage_data.values()}
        except TailorError as error:
            warnings.warn(f"{item.path.parent} is copied as it is: {error}", TailorWarning, stacklevel=3)
            continue
        for name in names:
            inside = os.path.normpath(item.path.parent / name)
            if os.path.isabs(name) or not Path(inside).is_relative_to(os.path.normpath(source)):  # noqa: PTH117
                raise CopyRefusedError(
                    f"{item.path.parent} needs {name}, which lies outside of {source}; copy the whole run, or make a "
                    f"self-contained copy with `tailor materialize`."
                )


def _check_destination(items: list[Item], job: CopyJob) -> None:
    """Refuse a destination that holds anything which an earlier call has not copied."""
    if not job.target.exists():
        return
    coming = {item.path.relative_to(job.source): item for item in items}
    for path in (path for _, paths in walk(job.target) for path in paths):
        name = path.relative_to(job.target)
        if path.name.endswith(PARTIAL):
            continue
        item = coming.get(name)
        if item is None:
            raise CopyRefusedError(
                f"{path} is not of {job.source}; name a folder that is new, or that an earlier copy of it has left."
            )
        fixed = name.suffix == ".distcp" or name.name == METADATA
        if not job.is_there(item) and (fixed or path.lstat().st_mtime_ns > item.status.st_mtime_ns):
            raise CopyRefusedError(f"{path} differs from {item.path}; remove it, or name another folder to copy to.")


# Copying ----------------------------------------------------------------------------------


def _advance(items: list[Item], progress: Callable[[int, int], None] | None) -> Advance:
    total, done = sum({item.inode: item.size for item in items}.values()), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return advance


def _settle(source: Path, target: Path) -> None:
    """Remove what killed calls have left, and give folders, empty ones too, their times."""
    for folder, paths in walk(target):
        for path in paths:
            if path.name.endswith(PARTIAL):
                path.unlink()
        sync_folder(folder)
    for folder, _ in reversed(list(walk(source))):
        new = target / folder.relative_to(source)
        if new.is_dir():
            status = folder.stat()
            os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
