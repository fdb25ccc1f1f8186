"""Changing archives, record by record, after which all checksums are right again."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from random import Random

from tests.fuzz.mutators.values import Mutate

_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_CENTRAL = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END = struct.Struct("<4sHHHHLLH")
_NAMES = (b"a/data/1", b"archive/data/../0", b"data.pkl", b"/data/0", b"")
_PICKLE_SHARE = 0.85
_TORN_SHARE = 0.05

Records = tuple[tuple[bytes, bytes], ...]


def archive(records: Sequence[tuple[bytes, bytes]], align: int = 64) -> bytes:
    """Return a zip archive of stored records, the bytes of each aligned as ``torch.save`` does it; 0 for no padding."""
    out, central = bytearray(), bytearray()
    for name, data in records:
        at, extra = len(out), b""
        if align:
            pad = -(at + _LOCAL.size + len(name) + 4) % align
            extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        crc, size = zlib.crc32(data), len(data)
        out += _LOCAL.pack(b"PK\3\4", 0, 0, 0, 0, 0, crc, size, size, len(name), len(extra)) + name + extra + data
        central += _CENTRAL.pack(b"PK\1\2", 0, 0, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, at) + name
    end = _END.pack(b"PK\5\6", 0, 0, len(records), len(records), len(central), len(out), 0)
    return bytes(out + central + end)


@lru_cache(maxsize=256)
def records_in(data: bytes) -> Records | None:
    """Return the names and bytes of an archive's records; None if it is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as held:
            return tuple((info.filename.encode(errors="replace"), held.read(info)) for info in held.infolist())
    except Exception:  # a damaged archive can lead to anything, and is then not taken apart
        return None


def archives(inner: Mutate) -> Mutate:
    """Return a mutator of archives, mostly of the pickle in them, which ``inner`` changes."""

    def mutate(data: bytes, random: Random) -> bytes:
        held = records_in(data)
        if not held:
            return data[: random.randrange(len(data) + 1)] + random.randbytes(4)
        records = list(held)
        pickled = next((n for n, (name, _) in enumerate(records) if name.endswith(b"data.pkl")), None)
        if pickled is not None and random.random() < _PICKLE_SHARE:
            name, content = records[pickled]
            records[pickled] = (name, inner(content, random))
        else:
            _change(records, random)
        made = archive(records, random.choice((64, 64, 64, 1, 0)))
        if random.random() < _TORN_SHARE:  # damage that no checksum knows of
            place = random.randrange(len(made))
            made = made[:place] + random.randbytes(1) + made[place + 1 :]
        return made

    return mutate


def _change(records: list[tuple[bytes, bytes]], random: Random) -> None:
    at = random.randrange(len(records))
    name, content = records[at]
    match random.randrange(6):
        case 0:
            records[at] = (name, content[: random.randrange(len(content) + 1)])
        case 1:
            del records[at]
        case 2:
            records.append((name, content + b"x"))
        case 3:
            records[at] = (random.choice(_NAMES), content)
        case 4:
            random.shuffle(records)
        case _:
            records[at] = (name, random.randbytes(len(content)))
