"""Transfer: a run copied to, from or between object stores, where a file has one name only.

What several checkpoints share is stored once, in the folder of the checkpoint that wrote it; the others refer to it by
the names that DCP's own readers follow there: absolute keys in a store, ``../step-100/…`` on a disk.
"""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tailor_dcp.base import Base, open_base
from tailor_dcp.carry import CARRIED, make_folder, sync_folder
from tailor_dcp.census import DOOMED, walk
from tailor_dcp.copy_job import PARTIAL, CopyRefusedError
from tailor_dcp.errors import TailorError, TailorWarning
from tailor_dcp.input_files import open_input
from tailor_dcp.location import METADATA, real
from tailor_dcp.metadata.compose import sign
from tailor_dcp.metadata.pickle_writer import dumps
from tailor_dcp.metadata.record import ATTRIBUTE
from tailor_dcp.ranges import Advance, write_all
from tailor_dcp.stores import copy_object, is_remote, same_store, writing

_THREADS = 8  # each waits for the store most of the time

_Identity = tuple[object, object]
"""What all names of one file have in common."""


class _Found(NamedTuple):
    """A file of the run, as it was when the copy began."""

    path: Path
    status: os.stat_result

    @property
    def identity(self) -> _Identity:
        return (str(self.path), None) if is_remote(self.path) else (self.status.st_dev, self.status.st_ino)


@dataclass(frozen=True)
class Transferred:
    """What was copied; see ``copying.Copied``. All sizes in bytes."""

    copied: int
    linked: int
    skipped: int
    bytes: int
    naive: int


def transfer(source: Path, target: Path, verify: bool, progress: Callable[[int, int], None] | None) -> Transferred:
    """Copy a run, or a checkpoint; see ``copying.copy``.

    Raises:
        CopyRefusedError: the target holds something else, or a checkpoint needs files outside of the source.
        OSError: a file cannot be read or written.
    """
    return _Transfer(source, target, verify, progress).done()


class _Transfer:
    def __init__(self, source: Path, target: Path, verify: bool, progress: Callable[[int, int], None] | None) -> None:
        self._source, self._target, self._verify, self._progress = source, target, verify, progress
        self._found = {str(real(one.path)): one for one in _files(source)}
        self._bases = {one.path: base for one in self._found.values() if (base := _opened(one.path)) is not None}
        self._homes = self._choose_homes()
        self._copied = self._skipped = self._done = 0
        self._lock = threading.Lock()

    def done(self) -> Transferred:
        data = [one for one in self._found.values() if self._is_stored(one)]
        committed = sorted(
            (one for one in self._found.values() if one.path.name == METADATA), key=lambda one: one.status.st_mtime_ns
        )
        there = self._there({self._new(one) for one in (*data, *committed)})
        total = sum(one.status.st_size for one in data)
        advance = self._advance(total)
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda one: self._bring(one, there, advance), data):
                pass
        for one in committed:  # after all data, the oldest first: some are ordered by this alone
            self._commit(one)
        every = sum(one.status.st_size for one in self._found.values())
        own = total + sum(one.status.st_size for one in committed)
        names = len(self._found) - len(data) - len(committed)
        return Transferred(self._copied, names, self._skipped, own, every)

    # What goes where ------------------------------------------------------------------------

    def _choose_homes(self) -> dict[_Identity, Path]:
        """Return under which of its names each file that checkpoints name is stored: the one that it was written by.

        Raises:
            CopyRefusedError: a checkpoint names a file that is not of the run.
        """
        homes: dict[_Identity, Path] = {}
        for metadata, base in self._bases.items():
            for name in {info.relative_path for info in base.metadata.storage_data.values()}:
                one = self._found.get(str(real(base.path(name))))
                if one is None:
                    raise CopyRefusedError(
                        f"{metadata.parent} needs {name}, which is not in {self._source}; copy the whole run, or make "
                        f"a self-contained copy with `tailor materialize`."
                    )
                known = homes.get(one.identity)
                if known is None or _rank(one.path) < _rank(known):
                    homes[one.identity] = one.path
        for one in self._found.values():  # its first name may be one that no checkpoint of these uses
            if one.identity in homes and _rank(one.path) < _rank(homes[one.identity]):
                homes[one.identity] = one.path
        return homes

    def _is_stored(self, one: _Found) -> bool:
        return one.path.name != METADATA and self._homes.get(one.identity, one.path) == one.path

    def _new(self, one: _Found) -> Path:
        return self._target / one.path.relative_to(self._source)

    def _there(self, coming: set[Path]) -> dict[Path, int]:
        """Return the sizes of what an earlier call has copied.

        Raises:
            CopyRefusedError: something else is there.
        """
        there = {one.path: one.status.st_size for one in _files(self._target)} if self._target.exists() else {}
        for path in there:
            if path not in coming:
                raise CopyRefusedError(
                    f"{path} is not of {self._source}; name a folder that is new, or that an earlier copy of it has "
                    f"left."
                )
        return there

    def _advance(self, total: int) -> Advance:
        def advance(count: int) -> None:
            with self._lock:
                self._done += count
                if self._progress:
                    self._progress(min(self._done, total), total)

        return advance

    # Copying --------------------------------------------------------------------------------

    def _bring(self, one: _Found, there: dict[Path, int], advance: Advance) -> None:
        new, size = self._new(one), one.status.st_size
        if there.get(new) == size and (not self._verify or _equal(one.path, new, size)):
            with self._lock:
                self._skipped += 1
            advance(size)
            return
        if same_store(one.path, new):
            copy_object(one.path, new)
            advance(size)
        else:
            _put(new, _told(_windows(one.path, size), advance), one.status)
        with self._lock:
            self._copied += size

    def _commit(self, one: _Found) -> None:
        """Put a ``.metadata`` that names everything as it is called at the destination."""
        base, new = self._bases.get(one.path), self._new(one)
        data = one.path.read_bytes() if base is None else dumps(self._renamed(base, new.parent))
        _put(new, iter([memoryview(data)]), one.status)
        self._copied += one.status.st_size

    def _renamed(self, base: Base, folder: Path) -> Metadata:
        metadata = base.metadata
        names = {
            name: self._name(base, name, folder) for name in {i.relative_path for i in metadata.storage_data.values()}
        }
        metadata.storage_data = {
            index: replace(info, relative_path=names[info.relative_path])
            for index, info in metadata.storage_data.items()
        }
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.checkpoint_id = str(folder)
        record = getattr(metadata, ATTRIBUTE, None)
        if record is not None:
            for field in ("crcs", "marks"):
                record[field] = {names.get(name, name): value for name, value in record.get(field, {}).items()}
            if any(names[name] != name for name in names):
                record["carry"] = "reference"
        sign(metadata)
        return metadata

    def _name(self, base: Base, name: str, folder: Path) -> str:
        """Return what a checkpoint's file is called there."""
        one = self._found[str(real(base.path(name)))]
        home = self._target / self._homes[one.identity].relative_to(self._source)
        if home.is_relative_to(folder):
            return PurePosixPath(home.relative_to(folder)).as_posix()
        return home.absolute_key if is_remote(home) else Path(os.path.relpath(home, folder)).as_posix()


def _rank(path: Path) -> tuple[bool, str]:
    """Order a file's names: the one that it was written by before those that it was carried by."""
    return CARRIED in path.parts, str(path)


def _opened(path: Path) -> Base | None:
    if path.name != METADATA:
        return None
    try:
        return open_base(path.parent)
    except TailorError as error:
        warnings.warn(f"{path.parent} is copied as it is: {error}", TailorWarning, stacklevel=4)
        return None


def _files(folder: Path) -> Iterator[_Found]:
    """Yield all files but temporary ones; of symbolic links, which stores do not have, none."""
    paths = folder.rglob("*") if is_remote(folder) else (path for _, paths in walk(folder) for path in paths)
    for path in paths:
        inside = path.relative_to(folder)
        if path.name.endswith((PARTIAL, f"{METADATA}.tmp")) or any(p.startswith(DOOMED) for p in inside.parts):
            continue
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            yield _Found(path, status)


def _windows(path: Path, size: int) -> Iterator[memoryview]:
    with open_input(path) as stream:
        yield from stream.windows(0, size)


def _told(windows: Iterator[memoryview], advance: Advance) -> Iterator[memoryview]:
    for window in windows:
        yield window
        advance(len(window))


def _put(new: Path, windows: Iterator[memoryview], status: os.stat_result) -> None:
    """Write a file; it has its name when it is complete."""
    if is_remote(new):
        with writing(new) as stream:
            for window in windows:
                stream.write(window)
        return
    make_folder(new.parent)
    partial = new.with_name(f"{new.name}{PARTIAL}")
    with partial.open("wb") as stream:
        for window in windows:
            write_all(stream.fileno(), window)
        os.utime(stream.fileno(), ns=(status.st_mtime_ns, status.st_mtime_ns))
        os.fsync(stream.fileno())
    partial.replace(new)
    sync_folder(new.parent)


def _equal(one: Path, other: Path, size: int) -> bool:
    def content(path: Path) -> Iterator[bytes]:
        buffer = bytearray()
        for window in _windows(path, size):
            buffer += window
            while len(buffer) >= 1 << 20:
                yield bytes(buffer[: 1 << 20])
                del buffer[: 1 << 20]
        yield bytes(buffer)

    return all(a == b for a, b in zip(content(one), content(other), strict=True))
