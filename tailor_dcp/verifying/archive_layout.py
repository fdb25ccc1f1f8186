"""The layout of what ``torch.save`` writes: a zip archive of stored records, of which every byte is accounted for.

Zip's checksums cover the records alone. Around them torch puts nothing that does not follow from the records: so where
each header says what the others say, and one thing begins where the one before ends, there is no room for a changed bit
that means anything. Zip readers look at far less.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_CENTRAL = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END = struct.Struct("<4sHHHHLLH")
_END64 = struct.Struct("<4sQHHLLQQQQ")
_LOCATOR = struct.Struct("<4sLQL")
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4sLLL"), struct.Struct("<4sLQQ")
_IS_DESCRIBED = 8
"""The flag that says that a record's checksum and size come behind it."""
_MASKED, _MASKED16 = 0xFFFFFFFF, 0xFFFF
_MOST = 1 << 20
"""Bytes of a directory; one of torch's has a hundred for each record."""

Read = Callable[[int, int], bytes]
"""Returns bytes of the archive: from where, how many."""


class LayoutError(Exception):
    """An archive is not as torch lays it out; says in half a sentence what is wrong."""


class Record(NamedTuple):
    """One record.

    Attributes:
        name: its name within the archive, without the archive's own.
        start: its first byte.
        size: its bytes.
        crc: their CRC-32 as the archive tells it.
    """

    name: str
    start: int
    size: int
    crc: int


class _Entry(NamedTuple):
    """What the directory tells of a record."""

    name: bytes
    flags: int
    time: int
    date: int
    crc: int
    size: int
    header: int


def is_archive(read: Read, length: int) -> bool:
    """Tell whether bytes begin or end as an archive does."""
    return length >= _END.size and (read(0, 4) == b"PK\x03\x04" or read(length - _END.size, 4) == b"PK\x05\x06")


def records_of(read: Read, length: int) -> list[Record]:
    """Return an archive's records in their order.

    Raises:
        LayoutError: a byte is not what it must be.
    """
    read = _within(read, length)
    end, entries = _directory(read, length)
    records, at = [], 0
    for entry in entries:
        if entry.header != at:
            raise LayoutError(f"a record begins at byte {entry.header} where byte {at} is free")
        record, at = _record(read, entry, end)
        records.append(record)
    if at != end:
        raise LayoutError(f"bytes {at} to {end} belong to no record")
    return records


def _within(read: Read, length: int) -> Read:
    def checked(at: int, count: int) -> bytes:
        if not 0 <= at <= at + count <= length:
            raise LayoutError("it says that it is longer than it is")
        return read(at, count)

    return checked


def _directory(read: Read, length: int) -> tuple[int, Sequence[_Entry]]:
    """Return where the directory begins, and what is in it."""
    if length < _END.size:
        raise LayoutError("it is too short")
    at = length - _END.size
    sign, disk, first, here, count, size, start, comment = _END.unpack(read(at, _END.size))
    if sign != b"PK\x05\x06" or disk or first or here != count or comment:
        raise LayoutError("its end is no archive's")
    if at >= _LOCATOR.size and read(at - _LOCATOR.size, 4) == b"PK\x06\x07":
        count, size, start, at = _end64(read, at - _LOCATOR.size, (count, size, start))
    if start + size != at or size > _MOST:
        raise LayoutError("its directory is not where its end says")
    return start, list(_entries(read(start, size), count))


def _end64(read: Read, locator: int, short: tuple[int, int, int]) -> tuple[int, int, int, int]:
    _, disk, where, disks = _LOCATOR.unpack(read(locator, _LOCATOR.size))
    at = locator - _END64.size
    if disk or disks != 1 or where != at:
        raise LayoutError("its end is not where it says")
    sign, rest, _, _, own, first, here, count, size, start = _END64.unpack(read(at, _END64.size))
    if sign != b"PK\x06\x06" or rest != _END64.size - 12 or own or first or here != count:
        raise LayoutError("its end is no archive's")
    for told, true, mask in zip(short, (count, size, start), (_MASKED16, _MASKED, _MASKED), strict=True):
        if told not in (true, mask):
            raise LayoutError("its two ends contradict each other")
    return count, size, start, at


def _entries(directory: bytes, count: int) -> Iterator[_Entry]:
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            raise LayoutError("its directory is cut off")
        sign, _, _, flags, method, time, date, crc, packed, size, *lengths, disk, inner, outer, header = (
            _CENTRAL.unpack_from(directory, at)
        )
        at += _CENTRAL.size
        name = directory[at : at + lengths[0]]
        extra = directory[at + lengths[0] : at + lengths[0] + lengths[1]]
        at += lengths[0] + lengths[1]
        if sign != b"PK\x01\x02" or method or lengths[2] or disk or inner or outer:
            raise LayoutError("its directory has an entry that torch does not write")
        if extra or _MASKED in (packed, size, header):
            packed, size, header = _long(extra, [size, packed, header])
        if packed != size:
            raise LayoutError(f"{_shown(name)} has two sizes")
        yield _Entry(name, flags, time, date, crc, size, header)
    if at != len(directory):
        raise LayoutError("its directory has bytes that belong to no entry")


def _long(extra: bytes, short: list[int]) -> tuple[int, int, int]:
    """Return sizes and place of a record that are too large for an entry's own fields."""
    long = [number for number, value in enumerate(short) if value == _MASKED]
    if extra[:4] != struct.pack("<HH", 1, 8 * len(long)) or len(extra) != 4 + 8 * len(long) or not long:
        raise LayoutError("its directory has a field that torch does not write")
    for number, value in zip(long, struct.unpack(f"<{len(long)}Q", extra[4:]), strict=True):
        short[number] = value
    size, packed, header = short
    return packed, size, header


def _record(read: Read, entry: _Entry, end: int) -> tuple[Record, int]:
    """Return a record whose headers agree, and where the next one begins."""
    shown = _shown(entry.name)
    if entry.header + _LOCAL.size > end:
        raise LayoutError(f"{shown} lies beyond the records")
    sign, _, flags, method, time, date, crc, packed, size, names, extras = _LOCAL.unpack(
        read(entry.header, _LOCAL.size)
    )
    at = entry.header + _LOCAL.size
    if sign != b"PK\x03\x04" or (flags, method, time, date) != (entry.flags, 0, entry.time, entry.date):
        raise LayoutError(f"the header of {shown} is not as the directory has it")
    described = bool(flags & _IS_DESCRIBED)
    told = (0, 0, 0) if described else (entry.crc, entry.size, entry.size)
    long = entry.size >= _MASKED or entry.header >= _MASKED
    if (crc, packed, size) != told and not (long and size == _MASKED == packed):
        raise LayoutError(f"the header of {shown} is not as the directory has it")
    if read(at, names) != entry.name:
        raise LayoutError(f"the header of {shown} has another name")
    if not _is_padding(read(at + names, extras)):
        raise LayoutError(f"the header of {shown} is filled up with something else")
    start = at + names + extras
    behind = start + entry.size
    if described:
        behind = _described(read, entry, behind, end)
    if behind > end:
        raise LayoutError(f"{shown} reaches beyond the records")
    name = entry.name.decode("utf-8", "replace").partition("/")[2]
    return Record(name, start, entry.size, entry.crc), behind


def _described(read: Read, entry: _Entry, at: int, end: int) -> int:
    for form in (_DESCRIPTOR, _DESCRIPTOR64):
        if at + form.size <= end and read(at, form.size) == form.pack(
            b"PK\x07\x08", entry.crc, *[min(entry.size, _MASKED) if form is _DESCRIPTOR else entry.size] * 2
        ):
            return at + form.size
    raise LayoutError(f"what is behind {_shown(entry.name)} is not as the directory has it")


def _is_padding(extra: bytes) -> bool:
    """Tell whether an extra field is what torch fills up with, after the long sizes that it may have."""
    if extra[:2] == b"\x01\x00" and len(extra) >= 4:
        extra = extra[4 + int.from_bytes(extra[2:4], "little") :]
    filled = max(0, len(extra) - 4)
    return not extra or extra == b"FB" + filled.to_bytes(2, "little") + b"Z" * filled


def _shown(name: bytes) -> str:
    return ascii(name[:80].decode("latin-1"))[1:-1]
