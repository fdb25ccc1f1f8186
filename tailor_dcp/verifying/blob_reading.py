"""Reading blobs to check them: each byte once, in order, several stretches of files at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tailor_dcp.input_files import open_input
from tailor_dcp.ranges import Advance, SourceError, ends
from tailor_dcp.stores import is_remote
from tailor_dcp.verifying.blob_checks import BlobCheck, Read, Seen, Want

_WINDOW = 512 << 10
"""Bytes that are read at once; they are still in the core's own cache when they are looked at."""
_RANGE = 8 << 20
"""The same of an object, each of which is a request."""
_SHARE = 64 << 20
"""Bytes that one thread reads before it takes the next."""


class _Share(NamedTuple):
    """Stretches of one file that one thread checks, in their order."""

    path: Path
    wants: Sequence[Want]


def check_blobs(files: dict[Path, list[Want]], threads: int, advance: Advance) -> dict[Path, dict[Want, Seen]]:
    """Check stretches of files.

    Args:
        files: what each must hold.
        threads: that read at the same time.
        advance: is told of bytes that were read, from any thread.
    """
    seen: dict[Path, dict[Want, Seen]] = {path: {} for path in files}
    shares = [_Share(path, part) for path, wants in files.items() for part in _shares(sorted(wants, key=_start))]
    workers = threading.local()

    def work(share: _Share) -> None:
        if not hasattr(workers, "memory"):
            workers.memory = memoryview(bytearray(_window(share.path)))
        worker = _Worker(share.path, workers.memory, advance)
        seen[share.path].update(worker.check(share.wants))

    if threads == 1 or len(shares) < 2:
        for share in shares:
            work(share)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, shares):
                pass
    return seen


def _start(want: Want) -> int:
    return want.offset


def _window(path: Path) -> int:
    return _RANGE if is_remote(path) else _WINDOW


def _shares(wants: Sequence[Want]) -> Iterator[list[Want]]:
    part: list[Want] = []
    size = 0
    for want in wants:
        part.append(want)
        size += want.length
        if size >= _SHARE:
            yield part
            part, size = [], 0
    if part:
        yield part


class _Worker:
    """One thread's work on one share."""

    def __init__(self, path: Path, memory: memoryview, advance: Advance) -> None:
        self._path, self._memory, self._advance = path, memory, advance
        self._descriptor: int | None = None

    def check(self, wants: Sequence[Want]) -> Iterator[tuple[Want, Seen]]:
        try:
            with open_input(self._path) as file:
                self._descriptor = file.descriptor
                yield from self._checked(wants)
        except OSError as error:  # only opening it raises one
            why = f"cannot be read: {error.strerror or error}"
            yield from ((want, Seen(False, why, opened=False)) for want in wants)

    def _checked(self, wants: Sequence[Want]) -> Iterator[tuple[Want, Seen]]:
        for together in self._windows(wants):
            first, last = together[0], together[-1]
            length = last.offset + last.length - first.offset
            if length > len(self._memory):
                yield first, self._guarded(first, self._streamed)
                continue
            window = self._memory[:length]
            try:
                self._fill(window, first.offset)
            except SourceError:  # which of them it is shows when they are read one by one
                yield from ((want, self._guarded(want, self._streamed)) for want in together)
                continue
            for want in together:
                start = want.offset - first.offset
                part = window[start : start + want.length]
                yield want, self._guarded(want, partial(_feed, part))
            self._advance(length)

    def _fill(self, memory: memoryview, offset: int) -> None:
        """Read as many bytes as there is memory for.

        Raises:
            SourceError: they cannot be read, or the file ends before.
        """
        if self._descriptor is None:
            end = 0
            with open_input(self._path) as file:
                for data in file.windows(offset, len(memory)):
                    memory[end : end + len(data)] = data
                    end += len(data)
            return
        while memory:
            try:
                count = os.preadv(self._descriptor, [memory], offset)
            except OSError as error:
                raise SourceError(error.errno, error.strerror) from error
            if not count:
                raise ends(offset, offset + len(memory))
            memory, offset = memory[count:], offset + count

    def _windows(self, wants: Sequence[Want]) -> Iterator[list[Want]]:
        """Yield stretches that lie together and fit into memory at once; a larger one alone."""
        part: list[Want] = []
        for want in wants:
            if part:
                end = part[-1].offset + part[-1].length
                if want.offset != end or want.offset + want.length - part[0].offset > len(self._memory):
                    yield part
                    part = []
            part.append(want)
        if part:
            yield part

    def _guarded(self, want: Want, fill: Callable[[BlobCheck], None]) -> Seen:
        check = BlobCheck(want, self._reader(want))
        try:
            fill(check)
            return check.end()
        except SourceError as error:
            return Seen(False, f"cannot be read: {error.strerror or error}")

    def _streamed(self, check: BlobCheck) -> None:
        want = check.want
        for at in range(want.offset, want.offset + want.length, len(self._memory)):
            window = self._memory[: want.offset + want.length - at]
            self._fill(window, at)
            check.feed(window)
            self._advance(len(window))

    def _reader(self, want: Want) -> Read:
        def read(at: int, count: int) -> bytes:
            data = bytearray(count)
            self._fill(memoryview(data), want.offset + at)
            return bytes(data)

        return read


def _feed(part: memoryview, check: BlobCheck) -> None:
    check.feed(part)
