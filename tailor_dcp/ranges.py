"""Copying stretches of files in bounded memory, in the kernel where it can."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Is told how many more bytes were copied."""

_PIECE = 8 << 20
_IN_KERNEL = 128 << 20  # of one call: a progress bar should move
_CLONE = 0x40049409  # FICLONE of linux/fs.h
# What copy_file_range and FICLONE say where they do not work at all: two file systems, an old kernel, an odd file.
_UNABLE = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTTY, errno.EISDIR}
)


def _silently(count: int) -> None:
    """Tell nobody."""


class SourceError(OSError):
    """A stretch of a file cannot be read, or the file ends before it does."""


def pieces(source: int, offset: int, length: int) -> Iterator[bytes]:
    """Yield a stretch of a file piece by piece.

    Raises:
        SourceError: it cannot be read, or the file ends before.
    """
    end = offset + length
    while offset < end:
        try:
            piece = os.pread(source, min(_PIECE, end - offset), offset)
        except OSError as error:
            raise SourceError(error.errno, error.strerror) from error
        if not piece:
            raise ends(offset, end)
        yield piece
        offset += len(piece)


def ends(offset: int, end: int) -> SourceError:
    """Return what to raise where a file has fewer bytes than are needed."""
    return SourceError(errno.EIO, f"it ends at byte {offset} where {end} are needed")


def write_all(target: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; one call may take less."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def copy_range(source: int, target: int, offset: int, length: int, advance: Advance = _silently) -> None:
    """Append a stretch of one file to another.

    Raises:
        SourceError: it cannot be read, or the file ends before.
    """
    done = in_kernel(source, target, offset, length, advance)
    for piece in pieces(source, offset + done, length - done):
        write_all(target, piece)
        advance(len(piece))


def copy_sparsely(source: int, target: int, size: int, advance: Advance = _silently) -> None:
    """Give an empty file a number of another's first bytes, and holes where that has holes.

    A file of a few bytes can say that it has a terabyte, nearly all of it on no block of the disk.

    Raises:
        SourceError: it cannot be read, or the file ends before.
    """
    done = 0
    for start, stop in _extents(source, size):
        advance(start - done)
        os.lseek(target, start, os.SEEK_SET)
        copy_range(source, target, start, stop - start, advance)
        done = stop
    if os.fstat(source).st_size < size:
        raise ends(os.fstat(source).st_size, size)
    advance(size - done)
    os.truncate(target, size)


def _extents(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where a file has bytes; all of it where the file system does not tell holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
            stop = os.lseek(source, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # which says that nothing but a hole comes after
                yield at, size
            return
        if start < size:
            yield start, min(stop, size)
        at = stop


def in_kernel(source: int, target: int, offset: int, length: int, advance: Advance = _silently) -> int:
    """Append as much of a stretch as the kernel copies by itself, on a file server without the bytes coming here.

    Returns:
        How many bytes that is; fewer than ``length`` where it cannot.
    """
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(source, target, min(length - done, _IN_KERNEL), offset + done)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            break
        if not count:
            break
        done += count
        advance(count)
    return done


def share_blocks(source: int, target: int) -> bool:
    """Give an empty file all bytes of another by sharing its blocks, which takes neither time nor room.

    Only whole files: a file system shares whole blocks, and what lies within a file rarely begins with one.

    Returns:
        Whether the file system can.
    """
    try:
        fcntl.ioctl(target, _CLONE, source)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        return False
    return True
