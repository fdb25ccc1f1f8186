"""Copying stretches of files in bounded memory, in the kernel where it can."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Is told how many more bytes were copied."""

_PIECE = 8 << 20
# What copy_file_range says where it does not work at all: two file systems, an old kernel, an odd file.
_UNABLE = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})


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
            raise SourceError(errno.EIO, f"it ends at byte {offset} where {end} are needed")
        yield piece
        offset += len(piece)


def write_all(target: int, data: bytes) -> None:
    """Write all of ``data``; one call may take less."""
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def copy_range(source: int, target: int, offset: int, length: int, advance: Advance = _silently) -> None:
    """Append a stretch of one file to another.

    Raises:
        SourceError: it cannot be read, or the file ends before.
    """
    done = _in_kernel(source, target, offset, length, advance)
    for piece in pieces(source, offset + done, length - done):
        write_all(target, piece)
        advance(len(piece))


def _in_kernel(source: int, target: int, offset: int, length: int, advance: Advance) -> int:
    """Copy as much as the kernel does by itself: a reflink on file systems that share blocks."""
    done = 0
    while done < length:
        try:
            # Not all at once: a progress bar should move.
            count = os.copy_file_range(source, target, min(length - done, 16 * _PIECE), offset + done)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            break
        if not count:
            break
        done += count
        advance(count)
    return done
