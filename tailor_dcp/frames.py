"""Frames: what ``torch.save`` writes around the bytes of one tensor.

A DCP blob is a whole zip archive for a single tensor. Knowing its frame, the tensor's bytes can be streamed
into the middle of it, window by window, without the tensor ever being in memory; and they can be read from
there without unpickling anything.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import IO, Any, NamedTuple, cast

import torch
from torch.serialization import skip_data

from tailor_dcp.crc import crc32
from tailor_dcp.zip_directory import CRC, entries

_DESCRIPTOR = b"PK\x07\x08"
_LOCAL = b"PK\x03\x04"
_RECORD = b"/data/0"
_ID = b"/.data/serialization_id"


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
    blank = outline(shape, dtype)
    filled = bytearray(blank.after)
    _fill(filled, blank.crcs, crc)
    return Frame(blank.before, bytes(filled))


class Outline(NamedTuple):
    """A frame whose checksum is still to be filled in.

    Attributes:
        before: what is before the tensor's bytes.
        data_bytes: how many these are.
        after: what is behind them.
        crcs: the two places in ``after`` that have the checksum of the tensor's bytes.
        id: where in ``after`` the digits are that torch makes of all checksums, and that nothing reads.
        id_crcs: the two places in ``after`` that have the checksum of these.
    """

    before: bytes
    data_bytes: int
    after: bytes
    crcs: tuple[int, int]
    id: slice
    id_crcs: tuple[int, int]

    @property
    def length(self) -> int:
        """Bytes of the whole archive."""
        return len(self.before) + self.data_bytes + len(self.after)

    def ends(self, crc: int, after: bytes) -> bool:
        """Tell whether a frame ends as it must around bytes of the given CRC-32."""
        if len(after) != len(self.after):
            return False
        filled = bytearray(self.after)
        _fill(filled, self.crcs, crc)
        filled[self.id] = after[self.id]
        _fill(filled, self.id_crcs, crc32(after[self.id]))
        return filled == after


def _fill(after: bytearray, places: tuple[int, int], crc: int) -> None:
    for place in places:
        after[place : place + 4] = crc.to_bytes(4, "little")


@lru_cache
def has_frame(dtype: torch.dtype) -> bool:
    """Tell whether torch saves tensors of a dtype by their bytes: no quantized ones, none narrower than a byte."""
    try:
        outline((1,), dtype)
    except (KeyError, RuntimeError):
        return False
    return True


@lru_cache(maxsize=4096)
def outline(shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Outline:
    """Return what ``torch.save`` writes around a tensor that has at least one element.

    Args:
        shape: the tensor's shape.
        dtype: its dtype.
        strides: its strides, in elements, which leave no gaps; None if it is contiguous.
    """
    # Memory that is never touched is never taken.
    blank = torch.empty(shape, dtype=dtype) if strides is None else torch.empty_strided(shape, strides, dtype=dtype)
    sink = _Sink()
    with skip_data():
        torch.save(blank, cast(IO[bytes], sink))
    before, after = sink.parts()
    head = after.find(_ID)  # its first name is that of its own header
    names = {entry.name: entry.place for entry in entries(after)}
    data = next((place for name, place in names.items() if name.endswith(_RECORD)), None)
    own = next((place for name, place in names.items() if name.endswith(_ID)), None)
    if data is None or own is None or not after.startswith(_DESCRIPTOR):
        raise RuntimeError("torch.save lays its archives out in a way that this version does not know.")
    start = head + len(_ID) + int.from_bytes(after[after.rfind(_LOCAL, 0, head) + 28 :][:2], "little")
    digits = slice(start, after.find(_DESCRIPTOR, start))
    return Outline(
        before,
        blank.untyped_storage().nbytes(),
        after,
        (len(_DESCRIPTOR), data + CRC),
        digits,
        (digits.stop + len(_DESCRIPTOR), own + CRC),
    )


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
