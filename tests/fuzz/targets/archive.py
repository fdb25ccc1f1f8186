"""The directory of an archive: every record that is told lies where ``zipfile`` reads it."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from random import Random

import torch

from tailor_dcp.archives import archived_in, touched
from tests.fuzz.mutators.archives import archive
from tests.fuzz.scratch import put
from tests.fuzz.target import Target
from tests.fuzz.targets.blob_head import blob


def parse(data: bytes) -> None:
    """Read the directory; compare each record's bytes with what zipfile gives for it."""
    path = put(data)
    records = archived_in(path)
    if not records:
        return
    list(touched(records, 0, len(data)))
    for record in records:
        assert 30 <= record.start <= record.start + record.length <= len(data), "a record outside of the file"
        if zlib.crc32(data[record.start : record.start + record.length]) == record.crc:
            continue
        # Whoever reads it compares the checksum, and finds the same as zipfile does.
        assert not _zipfile_reads(path, record.length, record.crc), "zipfile reads a record that is not found"


def _zipfile_reads(path: object, length: int, crc: int) -> bool:
    with zipfile.ZipFile(path) as held:  # type: ignore[call-overload]
        for info in held.infolist():
            if info.compress_type or (info.file_size, info.CRC) != (length, crc):
                continue
            try:
                held.read(info)
            except Exception:
                continue
            return True
    return False


def seeds() -> Iterator[bytes]:
    """Archives of torch's, and small ones."""
    yield blob(torch.zeros(3))
    yield blob({"a": torch.zeros(2), "b": torch.zeros(1)})
    yield archive([(b"a", b"")])
    yield archive([(b"a/data/0", b"x" * 40), (b"b", b"yy")], align=0)


def _mutate(data: bytes, random: Random) -> bytes:
    """Put numbers into headers, which is where the directory is."""
    out = bytearray(data)
    places = [at for mark in (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7") for at in _found(data, mark)]
    if not places:
        return data + random.choice((b"PK\5\6" + bytes(18), b"PK\3\4"))
    for _ in range(random.choice((1, 1, 2))):
        at = random.choice(places) + random.randrange(4, 46)
        width = random.choice((1, 2, 4))
        value = random.choice(
            (0, 1, 8, 30, 255, 65535, len(data), 1 << 31, (1 << 32) - 1, random.randrange(len(data) + 9))
        )
        out[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(out)


def _found(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


_WORDS = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\10", b"\1\0\10\0", b"\xff\xff\xff\xff")
TARGET = Target(parse, seeds, _mutate, _WORDS)
