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
from tailor_dcp.store_path import reason
from tailor_dcp.stores import is_remote
from tailor_dcp.verifying.blob_checks import BlobCheck, Read, Seen, Want
from tailor_dcp.verifying.failures import is_gone, is_lost, unread

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
            seen = self._failed(error)
            yield from ((want, seen) for want in wants)

    def _failed(self, error: OSError) -> Seen:
        if is_gone(error):
            return Seen("gone", "is in a file that is gone")
        if is_lost(error, self._path):
            return Seen("damaged", f"cannot be read: {reason(error)}")
        return Seen("unread", unread(error))

    def _checked(self, wants: Sequence[Want]) -> Iterator[tuple[Want, Seen]]:
        done = 0
        for together in self._windows(wants):
            seen = self._together(together)
            yield from zip(together, seen, strict=True)
            done += len(together)
            if seen[-1].outcome in ("gone", "unread"):  # what is asked next would wait as long, and learn as little
                yield from ((want, seen[-1]) for want in wants[done:])
                return

    def _together(self, wants: Sequence[Want]) -> list[Seen]:
        """Check stretches that lie together."""
        first, last = wants[0], wants[-1]
        length = last.offset + last.length - first.offset
        if length > len(self._memory):
            return [self._guarded(first, self._streamed)]
        window = self._memory[:length]
        try:
            self._fill(window, first.offset)
        except SourceError as error:
            seen = self._failed(error)
            if seen.outcome != "damaged":
                return [seen] * len(wants)
            return [self._guarded(want, self._streamed) for want in wants]  # one by one, it shows which of them it is
        starts = [want.offset - first.offset for want in wants]
        parts = [window[start : start + want.length] for start, want in zip(starts, wants, strict=True)]
        found = [self._guarded(want, partial(_feed, part)) for want, part in zip(wants, parts, strict=True)]
        self._advance(length)
        return found

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
            return self._failed(error)

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
