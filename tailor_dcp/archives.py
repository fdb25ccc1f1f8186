"""Archives: the records of what ``torch.save`` wrote for another program, and the checksum of each."""

from __future__ import annotations

import os
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.metadata.pickle_names import shown

_LOCAL_HEADER = 30


class Archived(NamedTuple):
    """A record.

    Attributes:
        start: its first byte in the file.
        length: its bytes.
        crc: their CRC-32.
    """

    start: int
    length: int
    crc: int


def archived_in(path: Path) -> Sequence[Archived]:
    """Return a file's uncompressed records in their order; none if it is no archive.

    Raises:
        DamagedSourceError: it is cut off, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                return ()
            with zipfile.ZipFile(stream) as archive:
                return sorted(_record(archive, entry) for entry in archive.infolist() if not entry.compress_type)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DamagedSourceError(f"{path} is damaged ({error}); copy it anew.") from error


def data_start(stream: IO[bytes], entry: zipfile.ZipInfo) -> int | None:
    """Return where in its archive a record's bytes start, behind its own header; None if that is cut off."""
    stream.seek(entry.header_offset)
    header = stream.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER:
        return None
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return entry.header_offset + _LOCAL_HEADER + names


def _record(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Archived:
    stream = archive.fp
    assert stream is not None
    start = data_start(stream, entry)
    # What is not compressed has one size; zipfile believes either.
    if (
        start is None
        or entry.compress_size != entry.file_size
        or start + entry.file_size > os.fstat(stream.fileno()).st_size
    ):
        raise zipfile.BadZipFile(f"the record {shown(entry.filename)} is not as long as the directory says")
    return Archived(start, entry.file_size, entry.CRC)


def touched(records: Sequence[Archived], offset: int, length: int) -> Iterator[Archived]:
    """Yield the records that a stretch has bytes of."""
    number = max(0, bisect_right(records, offset, key=lambda record: record.start) - 1)
    for record in records[number:]:
        if record.start >= offset + length:
            break
        if record.start + record.length > offset:
            yield record
