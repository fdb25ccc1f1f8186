"""Fetching: many stretches of files into memory, neighbours in one call, several threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tailor_dcp.open_files import read_all_into

_PIECE = 8 << 20
"""Bytes of one call: enough that calls cost nothing, small enough that threads end together."""
_GAP = 2048
"""Bytes that are read for nothing rather than in a call of their own; frames of ``torch.save`` have fewer."""
_VECTORS = 512


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


class _Call(NamedTuple):
    path: Path
    offset: int
    into: list[memoryview]


def fetch(fetches: Iterable[Fetch], threads: int) -> None:
    """Read everything.

    Raises:
        DamagedSourceError: a file is gone, ends before, or cannot be read.
    """
    calls = list(_joined(sorted(_cut(fetches), key=lambda one: (str(one.path), one.offset))))
    if threads == 1 or len(calls) == 1:
        for call in calls:
            read_all_into(*call)
        return
    with ThreadPoolExecutor(threads) as pool:
        work = [pool.submit(read_all_into, *call) for call in calls]
        try:
            for done in work:
                done.result()
        except BaseException:
            for waiting in work:
                waiting.cancel()
            raise


def _cut(fetches: Iterable[Fetch]) -> Iterator[Fetch]:
    for path, offset, into in fetches:
        for start in range(0, len(into), _PIECE):
            yield Fetch(path, offset + start, into[start : start + _PIECE])


def _joined(fetches: Iterable[Fetch]) -> Iterator[_Call]:
    """Join what lies close together in one file."""
    call: _Call | None = None
    end = size = 0
    for path, offset, into in fetches:
        gap = offset - end
        if call is None or path != call.path or not 0 <= gap <= _GAP or size > _PIECE or len(call.into) > _VECTORS:
            if call is not None:
                yield call
            call, size = _Call(path, offset, []), 0
        elif gap:
            call.into.append(memoryview(bytearray(gap)))
        call.into.append(into)
        end, size = offset + len(into), size + gap + len(into)
    if call is not None:
        yield call
