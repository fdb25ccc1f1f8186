"""Sums of blobs: the checksum of each, computed and compared while its bytes stream by.

The record of a ``LayerwiseWriter``'s save has the CRC-32 of every blob. What torch alone has saved has one of every
record of the zip archive that a blob is; so a blob's head is looked at first, which tells where its tensor's bytes lie.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tailor_dcp.crc import combine, crc32
from tailor_dcp.raw_blobs import HEAD, plain

_SMALL = 1 << 20
"""Bytes; what is no plain tensor is looked into as a whole, if it is not larger."""
_ARCHIVE = b"PK\x03\x04"
_DESCRIPTOR = b"PK\x07\x08"


class Sum(NamedTuple):
    """What came of one blob.

    Attributes:
        crc: CRC-32 of all its bytes.
        good: whether a checksum that it has agrees; None if it has none.
    """

    crc: int
    good: bool | None


class BlobSums:
    """Takes in the bytes of blobs that lie one behind the other.

    Args:
        lengths: each blob's bytes, and its CRC-32 where that is known.
    """

    def __init__(self, lengths: Iterable[tuple[int, int | None]]) -> None:
        self._coming = iter(lengths)
        self._blob: _Known | _Archived | None = None
        self._left = 0

    def feed(self, data: memoryview) -> Iterator[Sum]:
        """Take in the next bytes; yield the sum of each blob that ends in them."""
        while len(data):
            if self._blob is None:
                self._left, known = next(self._coming)
                self._blob = _Archived(self._left) if known is None else _Known(known)
            part = data[: self._left]
            self._blob.feed(part)
            self._left -= len(part)
            data = data[len(part) :]
            if not self._left:
                yield self._blob.sum()
                self._blob = None


class _Known:
    """A blob whose checksum is known."""

    def __init__(self, known: int) -> None:
        self._known, self._crc = known, 0

    def feed(self, data: memoryview) -> None:
        """Take in the next bytes."""
        self._crc = crc32(data, self._crc)

    def sum(self) -> Sum:
        """Return what came of it."""
        return Sum(self._crc, self._crc == self._known)


class _Archived:
    """A blob that has at most the checksums that ``torch.save`` puts into it."""

    def __init__(self, length: int) -> None:
        self._length, self._at = length, 0
        self._looked_at = length if length <= _SMALL else HEAD
        self._kept = bytearray()  # what was fed before it was looked at
        self._ends = (length, length, length)  # of what is before the tensor's bytes, of these, and of what is behind
        self._crcs = [0, 0, 0]
        self._behind = b""

    def feed(self, data: memoryview) -> None:
        """Take in the next bytes."""
        if len(self._kept) < self._looked_at:
            missing = self._looked_at - len(self._kept)
            self._kept += data[:missing]
            data = data[missing:]
            if len(self._kept) < self._looked_at:
                return
            found = plain(bytes(self._kept), self._length) if self._length > _SMALL else None
            if found:
                self._ends = (found.start, found.start + found.bytes, self._length)
            self._take(memoryview(self._kept))
        self._take(data)

    def _take(self, data: memoryview) -> None:
        for section, end in enumerate(self._ends):
            part = data[: max(0, end - self._at)]
            if not len(part):
                continue
            self._crcs[section] = crc32(part, self._crcs[section])
            if section == 2:
                self._behind += bytes(part[: 8 - len(self._behind)])
            self._at += len(part)
            data = data[len(part) :]

    def sum(self) -> Sum:
        """Return what came of it."""
        before, own, behind = self._crcs
        start, end, whole = self._ends
        if start == whole:
            return Sum(before, _is_good(bytes(self._kept)) if whole <= _SMALL else None)
        crc = combine(combine(before, own, end - start), behind, whole - end)
        told = int.from_bytes(self._behind[4:], "little") if self._behind[:4] == _DESCRIPTOR else 0
        return Sum(crc, told == own if told else None)


def _is_good(blob: bytes) -> bool | None:
    """Compare the checksums in a small archive; None if it is none, or torch was told to compute none."""
    if not blob.startswith(_ARCHIVE):
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or not any(entry.CRC for entry in entries):
                return None
            return archive.testzip() is None
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, EOFError):
        return False
