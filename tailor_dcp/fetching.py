"""Fetching: many stretches of files into memory, neighbours in one call, several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.open_files import announce, read_all_into, renew, spread
from tailor_dcp.staging import batches
from tailor_dcp.stores import Range, StorePath, is_remote, read_ranges

_PIECE = 8 << 20
"""Bytes of one call: enough that calls cost nothing, small enough that threads end together."""
_GAP = 2048
"""Bytes that are read for nothing rather than in a call of their own; frames of ``torch.save`` have fewer."""
_GAP_OF_OBJECTS = 32 << 10
"""The same for a store, where a request costs a round trip."""
_HELD = 128 << 20
"""Bytes of a store's objects that are on their way at once."""
_VECTORS = 512
_LITTLE = 4 << 20
"""Bytes that one thread has read before others have begun."""
_ANNOUNCED = 64
"""Calls that a disk is told of at once; fewer than the files that are kept open."""


class Fetch(NamedTuple):
    """Bytes of a file and where they go.

    Attributes:
        path: the file.
        offset: their first byte there.
        into: the memory, one byte an item, writable.
    """

    path: Path
    offset: int
    into: memoryview


@dataclass
class _Call:
    path: Path
    offset: int
    into: list[memoryview]
    size: int = 0


def fetch(fetches: Iterable[Fetch], threads: int) -> None:
    """Read everything.

    Raises:
        DamagedSourceError: a file is gone, ends before, or cannot be read.
    """
    joined = list(_joined(sorted(_cut(fetches), key=lambda one: (str(one.path), one.offset))))
    _read_objects([call for call in joined if is_remote(call.path)])
    calls = deque(call for call in joined if not is_remote(call.path))
    renew({call.path for call in calls})
    if sum(call.size for call in calls) <= _LITTLE:
        _read_little(list(calls))
        return

    def work() -> None:
        try:
            while calls:
                call = calls.popleft()
                read_all_into(call.path, call.offset, call.into)
        except IndexError:  # another thread took the last one
            pass
        except BaseException:
            calls.clear()
            raise

    # This thread reads as well: handing over every call would cost more than small calls take.
    helpers = min(threads, len(calls)) - 1
    if helpers < 1:
        work()
        return
    with ThreadPoolExecutor(helpers) as pool:
        helping = [pool.submit(work) for _ in range(helpers)]
        work()
    for one in helping:
        one.result()


def _read_little(calls: Sequence[_Call]) -> None:
    """Read what is too little for threads, which would wait for each other; the kernel is told of it beforehand."""
    for start in range(0, len(calls), _ANNOUNCED):
        part = calls[start : start + _ANNOUNCED]
        for call in part if len(part) > 1 else ():
            announce(call.path, call.offset, call.size)
        for call in part:
            read_all_into(call.path, call.offset, call.into)


def _read_objects(calls: Sequence[_Call]) -> None:
    """Read stretches of a store's objects, many at a time, with a bounded amount of memory beside the targets."""
    for part in batches(calls, _HELD, lambda call: call.size):
        ranges = [Range(cast(StorePath, call.path), call.offset, call.size) for call in part]
        try:
            found = read_ranges(ranges)
        except OSError as error:
            raise DamagedSourceError(
                f"{error.filename} cannot be read: {error.strerror}; try again, or copy it anew."
            ) from error
        for call, data in zip(part, found, strict=True):
            spread(data, call.into)


def _cut(fetches: Iterable[Fetch]) -> Iterator[Fetch]:
    for path, offset, into in fetches:
        for start in range(0, len(into), _PIECE):
            yield Fetch(path, offset + start, into[start : start + _PIECE])


def _joined(fetches: Iterable[Fetch]) -> Iterator[_Call]:
    """Join what lies close together in one file."""
    call: _Call | None = None
    end = 0
    for path, offset, into in fetches:
        gap = offset - end
        if (
            call is None
            or path != call.path
            or not 0 <= gap <= _gap(path)
            or call.size > _PIECE
            or len(call.into) > _VECTORS
        ):
            if call is not None:
                yield call
            call = _Call(path, offset, [])
        elif gap:
            call.into.append(memoryview(bytearray(gap)))
            call.size += gap
        call.into.append(into)
        end, call.size = offset + len(into), call.size + len(into)
    if call is not None:
        yield call


def _gap(path: Path) -> int:
    return _GAP_OF_OBJECTS if is_remote(path) else _GAP
