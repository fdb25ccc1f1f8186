"""The directory of an archive that ``torch.save`` has just made; ``verifying.archive_layout`` is for any other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_ENTRY = struct.Struct("<4s12xLLLHHH12x")  # signature, CRC, sizes, lengths of name, extra, comment
_SIGNATURE = b"PK\x01\x02"
CRC = 16
"""Where in an entry the checksum of its record is."""


class Entry(NamedTuple):
    """What the directory tells of a record.

    Attributes:
        place: where the entry begins in the bytes that were looked through.
        name: of the record, with the archive's own.
        crc: CRC-32 of its bytes.
        size: how many these are; 0xFFFFFFFF where they are more than that says.
    """

    place: int
    name: bytes
    crc: int
    size: int


def entries(framing: bytes) -> Iterator[Entry]:
    """Yield the entries of the directory that is somewhere in an archive's bytes, with or without its records' own."""
    at = framing.find(_SIGNATURE)
    while 0 <= at <= len(framing) - _ENTRY.size:
        signature, crc, _, size, *lengths = _ENTRY.unpack_from(framing, at)
        if signature != _SIGNATURE:
            return
        start = at + _ENTRY.size
        yield Entry(at, framing[start : start + lengths[0]], crc, size)
        at = start + sum(lengths)
