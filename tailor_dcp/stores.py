"""Stores: moving bytes to, from and within object stores.

``place`` gives the path of a URL; with it everything else works as on folders (``store_path``). What is here has no
counterpart among ``pathlib``'s methods: many ranges at once, uploads that appear whole or not at all, copies that the
store makes by itself. Whatever a store's library raises arrives as an ``OSError`` whose ``strerror`` says in half a
sentence why, and whose ``filename`` is the URL. 503s, slow and dropped responses are retried by the store's own
library (s3fs: five times, each of which botocore tries again), so an error means that it is over.
"""

from __future__ import annotations

import errno
import io
import os
import stat as modes
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from tailor_dcp.store_path import StorePath, StoreUnavailableError, is_url, place, told

__all__ = [
    "Range",
    "StorePath",
    "StoreUnavailableError",
    "copy_object",
    "is_remote",
    "is_url",
    "place",
    "read_ranges",
    "same_store",
    "sizes",
    "stats",
    "writing",
]

_ASKED_AT_ONCE = 32
_NOWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What is said of paths that lead to no file, whoever asks."""
_BLOCK = 8 << 20
"""Bytes that are given to an upload at once; it gathers them into parts of its own size (s3fs: 50 MiB)."""


class Range(NamedTuple):
    """Bytes of an object.

    Attributes:
        path: the object.
        start: the first byte.
        length: how many.
    """

    path: StorePath
    start: int
    length: int


def is_remote(path: object) -> TypeGuard[StorePath]:
    """Tell whether a path is an object store's, as ``place`` returned it."""
    return isinstance(path, StorePath)


def same_store(one: Path, other: Path) -> bool:
    """Tell whether bytes of one place can be copied to the other by the store itself."""
    return is_remote(one) and is_remote(other) and one._same_store(other)


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Read ranges of objects of one store, many at a time, each with a request of its own.

    The caller joins neighbours, and asks for no more at once than it has memory for.

    Raises:
        FileNotFoundError: an object is not there.
        OSError: one cannot be read, or ends before.
    """
    wanted = [one for one in ranges if one.length]
    if not wanted:
        return [b""] * len(ranges)
    found = iter(_fetched(wanted))
    return [next(found) if one.length else b"" for one in ranges]


def _fetched(ranges: Sequence[Range]) -> list[bytes]:
    with told(ranges[0].path):
        answers: list[Any] = ranges[0].path.fs.cat_ranges(
            [one.path.address for one in ranges],
            [one.start for one in ranges],
            [one.start + one.length for one in ranges],
            on_error="return",
        )
    for one, answer in zip(ranges, answers, strict=True):
        with told(one.path):
            if isinstance(answer, BaseException):
                raise answer
            if len(answer) != one.length:
                raise OSError(errno.EIO, f"it ends at byte {one.start + len(answer)} where more are needed")
    return answers


def stats(paths: Sequence[Path]) -> list[os.stat_result | OSError | None]:
    """Return what is known of each file, None for what is not there or is no file, an error where it cannot be asked.

    Objects of stores are asked for many at a time, as each HEAD takes a round trip.
    """
    if len(paths) < 2 or not any(is_remote(path) for path in paths):
        return [_stat(path) for path in paths]
    with ThreadPoolExecutor(min(_ASKED_AT_ONCE, len(paths))) as pool:
        return list(pool.map(_stat, paths))


def _stat(path: Path) -> os.stat_result | OSError | None:
    try:
        status = path.stat()
    except OSError as error:
        return None if error.errno in _NOWHERE else error
    return status if modes.S_ISREG(status.st_mode) else None


def sizes(paths: Sequence[Path]) -> list[int | None]:
    """Return the bytes of each file, None for what is not there, is no file or cannot be asked for; see ``stats``."""
    return [found.st_size if isinstance(found, os.stat_result) else None for found in stats(paths)]


def copy_object(source: Path, target: Path) -> None:
    """Copy an object within its store; no byte of it comes here.

    Raises:
        FileNotFoundError: there is no such object.
        OSError: it cannot be copied.
    """
    assert is_remote(source) and is_remote(target)
    with told(source):
        source.fs.cp_file(source.address, target.address)


@contextmanager
def writing(path: Path) -> Generator[io.RawIOBase, None, None]:
    """Write an object, in parts where it is large; it appears when all is written, or not at all.

    The name must be new: where writing fails, what may be there already is removed.

    Raises:
        OSError: it cannot be written. Parts that were uploaded are given up.
    """
    assert is_remote(path)
    with told(path):
        raw = path.fs.open(path.address, "wb")
    upload = _Upload(raw, path)
    try:
        yield upload
        with told(path):
            raw.close()
    except BaseException:
        _give_up(raw, path)
        raise


def _give_up(raw: Any, path: StorePath) -> None:
    """Drop what was written. Merely closing a store's file would complete it."""
    with suppress(Exception):
        raw.discard()
    with suppress(Exception):
        raw.closed = True
    with suppress(Exception):
        path.fs.rm_file(path.address)


class _Upload(io.RawIOBase):
    """An object that is being written, from front to end."""

    def __init__(self, raw: Any, path: StorePath) -> None:
        super().__init__()
        self._raw, self._path, self._end = raw, path, 0

    def writable(self) -> bool:
        """Say that it can be written."""
        return True

    def write(self, data: Any) -> int:
        """Write all of ``data``, never holding more than a part of it."""
        view = memoryview(data).cast("B")
        with told(self._path):
            for start in range(0, len(view), _BLOCK):
                self._raw.write(view[start : start + _BLOCK])
        self._end += len(view)
        return len(view)

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._end
