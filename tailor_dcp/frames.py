"""Frames: what ``torch.save`` writes around the bytes of one tensor.

A DCP blob is a whole zip archive for a single tensor. Knowing its frame, the tensor's bytes can be streamed
into the middle of it, window by window, without the tensor ever being in memory; and they can be read from
there without unpickling anything.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache
from typing import IO, Any, NamedTuple, cast

import torch
from torch.serialization import skip_data

_DESCRIPTOR = b"PK\x07\x08"
_CENTRAL = struct.Struct("<4s12xLLLHHH12x")  # signature, CRC, sizes, lengths of name, extra, comment
_SIGNATURE = b"PK\x01\x02"
_CRC_IN_CENTRAL = 16
_RECORD = b"/data/0"


class Frame(NamedTuple):
    """The bytes before and after a tensor's own, in the archive that ``torch.save`` makes of it."""

    before: bytes
    after: bytes


def frame(shape: tuple[int, ...], dtype: torch.dtype, crc: int) -> Frame:
    """Return the frame of a contiguous tensor on the CPU that has at least one element.

    Args:
        shape: the tensor's shape.
        dtype: its dtype.
        crc: CRC-32 of its bytes.
    """
    before, after, places = _blank(shape, dtype)
    filled = bytearray(after)
    for place in places:
        filled[place : place + 4] = crc.to_bytes(4, "little")
    return Frame(before, bytes(filled))


@lru_cache(maxsize=4096)
def _blank(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes, tuple[int, int]]:
    """Return a frame without its CRC, and the two places in the part after the data where that goes."""
    sink = _Sink()
    with skip_data():
        # Memory that is never touched is never taken.
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], sink))
    before, after = sink.parts()
    central = after.find(_SIGNATURE)
    while central >= 0:
        signature, _, _, _, name, extra, comment = _CENTRAL.unpack_from(after, central)
        start = central + _CENTRAL.size
        if signature == _SIGNATURE and after[start : start + name].endswith(_RECORD):
            break
        central = after.find(_SIGNATURE, start + name + extra + comment)
    if central < 0 or not after.startswith(_DESCRIPTOR):
        raise RuntimeError("torch.save lays its archives out in a way that this version does not know.")
    return before, after, (len(_DESCRIPTOR), central + _CRC_IN_CENTRAL)


class _Sink(io.RawIOBase):
    """Takes an archive in whose middle ``torch.save`` has left out the data."""

    def __init__(self) -> None:
        super().__init__()
        self._parts = [bytearray()]
        self._position = 0

    def parts(self) -> tuple[bytes, bytes]:
        """Return what was written before and after the gap."""
        before, after = self._parts
        return bytes(before), bytes(after)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts[-1] += data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._parts.append(bytearray())
        self._position = offset if whence == io.SEEK_SET else self._position + offset
        return self._position

    def tell(self) -> int:
        return self._position
