"""Input files: stretches of local files and of objects, in windows of bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from tailor_dcp.ranges import SourceError, ends
from tailor_dcp.stores import Range, StorePath, is_remote, read_ranges

_WINDOW = 1 << 20  # stays in a core's cache between the kernel that fills it and whoever looks at it
_RANGE = 8 << 20  # of one request
_AT_ONCE = 4


class InputFile(Protocol):
    """A file that is read from."""

    descriptor: int | None
    """What the kernel knows it by; None for an object."""

    def windows(self, offset: int, length: int) -> Iterator[memoryview]:
        """Yield a stretch in pieces, each valid until the next is asked for.

        Raises:
            SourceError: it cannot be read, or the file ends before.
        """


def open_input(path: Path) -> AbstractContextManager[InputFile]:
    """Open a file.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    return _Object(path) if is_remote(path) else _LocalFile(path)


class _LocalFile(AbstractContextManager["_LocalFile"]):
    def __init__(self, path: Path) -> None:
        # A pipe that somebody left there must not make it wait for ever.
        self.descriptor: int | None = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def __exit__(self, *_: object) -> None:
        assert self.descriptor is not None
        os.close(self.descriptor)

    def windows(self, offset: int, length: int) -> Iterator[memoryview]:
        assert self.descriptor is not None
        end, memory = offset + length, memoryview(bytearray(min(_WINDOW, length)))
        while offset < end:
            try:
                count = os.preadv(self.descriptor, [memory[: end - offset]], offset)
            except OSError as error:
                raise SourceError(error.errno, error.strerror) from error
            if not count:
                raise ends(offset, end)
            yield memory[:count]
            offset += count


class _Object(AbstractContextManager["_Object"]):
    descriptor: int | None = None

    def __init__(self, path: StorePath) -> None:
        self._path = path

    def __exit__(self, *_: object) -> None:
        """Nothing is open between two requests."""

    def windows(self, offset: int, length: int) -> Iterator[memoryview]:
        end = offset + length
        starts = range(offset, end, _RANGE)
        for first in range(0, len(starts), _AT_ONCE):
            ranges = [Range(self._path, at, min(_RANGE, end - at)) for at in starts[first : first + _AT_ONCE]]
            try:
                found = read_ranges(ranges)
            except OSError as error:
                raise SourceError(error.errno, error.strerror) from error
            yield from (memoryview(one) for one in found)
