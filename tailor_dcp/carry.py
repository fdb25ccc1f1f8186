"""Carrying: making files of an earlier checkpoint part of a new one, without writing their bytes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.errors import TailorError
from tailor_dcp.location import METADATA, Location, is_within, real
from tailor_dcp.metadata.record import CarryMode
from tailor_dcp.ranges import copy_range
from tailor_dcp.stores import copy_object, is_remote, same_store, sizes

CARRIED = "carried"
"""The sub-folder that holds earlier files, one folder for each save that wrote some."""


_SAVE_ID = re.compile(r"[0-9A-Za-z-]{8,64}")  # it becomes a folder's name, whoever wrote it


class Source(NamedTuple):
    """A file that holds bytes to be carried.

    Attributes:
        save_id: the save that wrote it.
        size: how many bytes it must at least have.
        path: where it is; None for where its name says.
    """

    save_id: str
    size: int
    path: Path | None = None


@dataclass
class Placement:
    """What became of the files that were to be carried.

    Attributes:
        paths: each file's path relative to the new checkpoint's folder.
        failures: why the others cannot be carried.
    """

    paths: dict[str, str] = field(default_factory=dict)
    failures: dict[str, OSError] = field(default_factory=dict)


def place(files: Mapping[str, Source], base: Location, target: Location, mode: CarryMode) -> Placement:
    """Make files of ``base`` part of ``target``.

    Args:
        files: the files by their path relative to ``base``.
        base: the checkpoint to carry from.
        target: the checkpoint that is being written.
        mode: ``link``, ``reference`` or ``copy``.

    Returns:
        The new paths, and for each file that cannot be carried the reason. Nothing is raised:
        what cannot be carried is written instead.
    """
    placement = Placement()
    touched: set[Path] = set()
    paths = [_path(name, source, base) for name, source in files.items()]
    if mode == "reference" and real(base.run) != real(target.run):  # a save into that run would not know of it
        why = f"a reference must stay inside the run {target.run}"
        refused = {name: OSError(errno.EPERM, why, str(path)) for name, path in zip(files, paths, strict=True)}
        return Placement(failures=refused)
    for (name, source), path, size in zip(files.items(), paths, sizes(paths), strict=True):
        try:
            _check(path, base, source, size)
            new = _MODES[mode](path, target, source)
        except OSError as error:
            error.filename = str(path)
            placement.failures[name] = error
            continue
        placement.paths[name] = new
        touched.add((target.folder / new).parent)
    if mode != "reference":
        _make_durable(touched, target.folder)
    return placement


def remove(paths: set[str], folder: Path) -> None:
    """Remove files that were placed and turned out not to be needed, and folders left empty."""
    for path in paths:
        if path.startswith(f"{CARRIED}/"):  # what is only referred to belongs to others
            with suppress(OSError):
                (folder / path).unlink()
    prune_empty(folder / CARRIED)


def prune_empty(carried: Path) -> None:
    """Remove ``carried`` and its sub-folders where they are empty."""
    for place_ in (*folders_in(carried), carried):
        with suppress(OSError):
            place_.rmdir()


def folders_in(carried: Path) -> list[Path]:
    """Return the sub-folders of ``carried``; what a symbolic link leads to is not the checkpoint's."""
    return [] if carried.is_symlink() else [path for path in carried.glob("*") if not path.is_symlink()]


class RemovedMeanwhileError(TailorError):
    """What a save has written, or carries, is gone before it was committed."""


def check_there(metadata: Metadata, folder: Path | None) -> None:
    """Check, right before the commit, that the files are there which a checkpoint will name.

    A save into a folder removes what earlier ones have left there, and cannot tell a save that is under way from one
    that was killed. It does so once it is committed: where nothing is, only what is carried is looked for. What other
    ranks have written may lie on disks of their own, and is theirs to find.

    Args:
        metadata: the checkpoint's.
        folder: where it will be; None if nobody knows. Nothing is checked in stores, nor where it is not there yet: a
            conversion grows beside it.

    Raises:
        RemovedMeanwhileError: naming one that is not.
    """
    if folder is None or is_remote(folder) or not folder.exists():
        return
    names = {info.relative_path for info in metadata.storage_data.values() if not info.relative_path.startswith("/")}
    if not (folder / METADATA).exists():
        names = {name for name in names if name.startswith(("../", f"{CARRIED}/"))}
    listed = {parent: _listed(parent) for parent in {(folder / name).parent for name in names}}
    for name in sorted(names):
        path = folder / name
        # A shared file system may show an old listing for a minute; asked for one name it asks its server.
        if path.name not in listed[path.parent] and not os.path.lexists(path):
            who = "something, such as a prune," if name.startswith("../") else f"another save into {folder}"
            raise RemovedMeanwhileError(
                f"{path} is gone: {who} has removed it meanwhile. This save was not committed; save again, into a "
                f"folder that nothing else saves into."
            )


def _listed(folder: Path) -> set[str]:
    """Return the names in a folder: one look for all of its files."""
    try:
        return {entry.name for entry in os.scandir(folder)}
    except FileNotFoundError:
        return set()


def _path(name: str, source: Source, base: Location) -> Path:
    path = source.path or base.folder / name
    return real(path.parent) / path.name


def _check(path: Path, base: Location, source: Source, size: int | None) -> None:
    if not _SAVE_ID.fullmatch(source.save_id):
        why = f"{source.save_id!r} is no save id" if source.save_id else "torch before 2.4 wrote it, without a save id"
        raise OSError(errno.EPERM, why)
    if not is_within(path, base.run):
        raise OSError(errno.EPERM, "it lies outside the run's folder")
    if size is None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    if size < source.size:
        raise OSError(errno.EIO, f"it has {size} bytes where {source.size} are needed")


def _link(path: Path, target: Location, source: Source) -> str:
    new = _carried_path(path, target, source)
    try:
        os.link(os.path.realpath(path), new)  # of a symbolic link, link(2) would make another one
    except FileExistsError:
        if not os.path.samestat(path.stat(), new.stat()):
            raise
        with suppress(OSError):
            os.utime(new.parent)  # so that it is not taken for what an earlier save has left
    return new.relative_to(target.folder).as_posix()


def _copy(path: Path, target: Location, source: Source) -> str:
    new = _carried_path(path, target, source)
    if is_remote(new):
        if not same_store(path, new):
            raise OSError(errno.EXDEV, "it is in another store")
        copy_object(path, new)
        return new.relative_to(target.folder).as_posix()  # type: ignore[no-any-return]
    copy_file(path, new)
    return new.relative_to(target.folder).as_posix()


def _refer(path: Path, target: Location, source: Source) -> str:
    if is_remote(path):
        return path.absolute_key
    # ``..`` of a symbolic link leads to where it points, and such a link may point elsewhere tomorrow.
    return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(target.folder))).as_posix()


_MODES: dict[CarryMode, Callable[[Path, Location, Source], str]] = {
    "link": _link,
    "copy": _copy,
    "reference": _refer,
}


def _carried_path(path: Path, target: Location, source: Source) -> Path:
    folder = target.folder / CARRIED / source.save_id
    if folder.is_symlink() or folder.parent.is_symlink():
        raise OSError(errno.EPERM, f"{folder} would be written through a symbolic link, which may lead anywhere")
    if not is_remote(folder):
        make_folder(target.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / path.name


def _make_durable(folders: set[Path], root: Path) -> None:
    """Force new names to the disk: ``.metadata`` must never outlive what it names."""
    if folders and not is_remote(root):
        for folder in (*folders, root / CARRIED, root, root.parent):
            sync_folder(folder)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing; their names are on the disk before anything is in them.

    What is flushed within a folder is lost with power all the same if the folder's own name was not.
    """
    missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def open_anew(path: Path) -> BinaryIO:
    """Open a file to write it; what has its name goes before: a link would lead to somebody else's file.

    Raises:
        OSError: it cannot be made.
    """
    try:
        return path.open("xb")
    except FileExistsError:
        path.unlink()
        return path.open("xb")


def copy_file(path: Path, new: Path) -> None:
    """Copy a file, complete and flushed or not at all, as a clone where the file system can.

    Raises:
        OSError: the disk is full, or the like.
    """
    partial = new.with_name(f"{new.name}.partial")
    try:
        with path.open("rb") as old, open_anew(partial) as stream:
            copy_range(old.fileno(), stream.fileno(), 0, os.fstat(old.fileno()).st_size)
            os.fsync(stream.fileno())
        partial.replace(new)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush what is in a file that was written by somebody who did not.

    Raises:
        OSError: the disk is failing, or the like.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_CANNOT = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries; file systems that cannot do it need not.

    Raises:
        OSError: the disk is failing, or the like: what the folder holds may be lost.
    """
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def explain(error: OSError) -> str:
    """Say in half a sentence why a file cannot be carried."""
    name = errno.errorcode.get(error.errno, "") if error.errno else ""
    return f"{error.filename}: {error.strerror or error}" + (f" [{name}]" if name else "")
