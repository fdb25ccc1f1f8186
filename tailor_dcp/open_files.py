"""Open files: kept open while they are read again and again, and never more than a process may have."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.stores import Range, StorePath, is_remote, read_ranges

_OPEN_FILES = 128


def read_file(path: Path, offset: int, into: memoryview) -> None:
    """Fill ``into`` with a file's bytes from ``offset`` on.

    Raises:
        DamagedSourceError: the file is gone, ends before, or cannot be read.
    """
    renew([path])
    read_all_into(path, offset, [into])


def read_all_into(path: Path, offset: int, into: Sequence[memoryview]) -> None:
    """Fill several stretches of memory with a file's bytes from ``offset`` on, one after the other.

    The caller says ``renew`` beforehand, once for many of them.

    Raises:
        DamagedSourceError: the file is gone, ends before, or cannot be read.
    """
    if is_remote(path):
        _read_object(path, offset, into)
        return
    with _files.use(path) as file:
        rest = list(into)
        while rest:
            try:
                count = os.preadv(file.descriptor, rest, offset)
            except OSError as error:
                raise DamagedSourceError(f"{path} cannot be read: {error.strerror}; copy it anew.") from error
            if not count:
                raise DamagedSourceError(f"{path} ends before byte {offset + sum(map(len, rest))}; copy it anew.")
            offset += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = rest[0][count:]


def _read_object(path: StorePath, offset: int, into: Sequence[memoryview]) -> None:
    try:
        (data,) = read_ranges([Range(path, offset, sum(map(len, into)))])
    except OSError as error:
        raise DamagedSourceError(f"{path} cannot be read: {error.strerror}; try again, or copy it anew.") from error
    spread(data, into)


def spread(data: bytes, into: Sequence[memoryview]) -> None:
    """Put bytes into several stretches of memory, one after the other."""
    start = 0
    for part in into:
        part[:] = data[start : start + len(part)] if len(into) > 1 else data
        start += len(part)


def announce(path: Path, offset: int, length: int) -> None:
    """Tell the system that a stretch will be read soon, so that a disk can bring many of them at once.

    Raises:
        DamagedSourceError: the file cannot be opened.
    """
    if hasattr(os, "posix_fadvise"):  # macOS has none
        with _files.use(path) as file, suppress(OSError):
            os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)


class _OpenFile:
    """A file that several threads read; closed when the last has let go of it after it was dropped."""

    def __init__(self, path: Path) -> None:
        try:
            # A pipe that somebody left there must not make it wait for ever.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedSourceError(f"{path} cannot be opened: {error.strerror}.") from error
        self._status = os.fstat(self.descriptor)

    def is_at(self, path: Path) -> bool:
        """Tell whether the path still leads to this file, and not to one that was put in its place."""
        try:
            return os.path.samestat(self._status, path.stat())
        except OSError:
            return False

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Stay open: the pool, or nobody, refers to it; ``__del__`` closes."""

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Files:
    """Keeps files open that are read again and again, and not more of them than a process may have."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def use(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._open.pop(path, None) or _OpenFile(path)
            self._open[path] = file
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file

    def renew(self, paths: Iterable[Path]) -> None:
        with self._lock:
            for path in paths:
                file = self._open.get(path)
                if file is not None and not file.is_at(path):
                    del self._open[path]

    def close(self) -> None:
        with self._lock:
            self._open.clear()


_files = _Files()


def renew(paths: Iterable[Path]) -> None:
    """Let go of files that another has been put in the place of since they were opened, or nothing."""
    _files.renew(paths)


def close_files() -> None:
    """Close the files that reading has left open."""
    _files.close()
