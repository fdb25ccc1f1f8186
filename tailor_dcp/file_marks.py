"""Marks: what tells that a file which another program wrote, and may write again, is still the one it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tailor_dcp.crc import crc32
from tailor_dcp.errors import DamagedSourceError

_SAMPLES = 64
_SAMPLE = 4096
_TAIL = 64 << 10
"""Bytes; where ``torch.save`` puts the checksums of everything before."""


class Mark(NamedTuple):
    """A file at the time when it was linked.

    Attributes:
        size: its bytes.
        sample: CRC-32 of its end and of pieces all over it. Training on, and saving to the same name again, changes
            every one of these; a copy of the file keeps them. Reading them takes as long for any size.
    """

    size: int
    sample: int


def mark_of(path: Path) -> Mark:
    """Return a file's mark.

    Raises:
        DamagedSourceError: it is gone, or cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as stream:
            size, crc = os.fstat(stream.fileno()).st_size, 0
            for start, length in _places(size):
                crc = crc32(os.pread(stream.fileno(), length, start), crc)
    except OSError as error:
        raise DamagedSourceError(f"{path} cannot be read: {error.strerror}.") from error
    return Mark(size, crc)


def _places(size: int) -> list[tuple[int, int]]:
    tail = min(size, _TAIL)
    rest = size - tail
    if rest <= _SAMPLES * _SAMPLE:
        pieces = [(start, min(_SAMPLE, rest - start)) for start in range(0, rest, _SAMPLE)]
    else:
        pieces = [(number * (rest - _SAMPLE) // (_SAMPLES - 1), _SAMPLE) for number in range(_SAMPLES)]
    return [*pieces, (rest, tail)] if tail else pieces
