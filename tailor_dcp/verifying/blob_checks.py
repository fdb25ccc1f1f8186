"""Checks of blobs: whether the bytes of one are those that were written, and those of what the metadata says.

A blob of ``LayerwiseWriter`` has its CRC-32 in the record. Any other is what ``torch.save`` wrote: its bytes before
and behind the tensor's own follow from shape, dtype and one checksum, so they are made anew and compared. Where they
differ, as those of another torch version do, every byte is accounted for instead.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from tailor_dcp.crc import crc32
from tailor_dcp.frames import Outline, has_frame, outline
from tailor_dcp.raw_blobs import HEAD, described
from tailor_dcp.verifying.archive_layout import LayoutError, Read, Record, is_archive, records_of

_WINDOW = 1 << 20

Kind = Literal["tensor", "entry", "transformed"]


class Want(NamedTuple):
    """What a stretch of a file must be.

    Attributes:
        offset: its first byte.
        length: its bytes.
        kind: a ``tensor``, an ``entry`` that is none, or what one of DCP's extensions made of either.
        crc: CRC-32 of all its bytes, None where no record tells it.
        shape: of the tensor.
        dtype: of the tensor.
    """

    offset: int
    length: int
    kind: Kind
    crc: int | None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


Outcome = Literal["good", "damaged", "untold", "gone", "unread"]
"""What a stretch is: what it must be, not that, or either, as nothing tells; or its file was gone once it was to be
opened, though it may still be there by another name; or it could not be read, which says nothing about it."""


class Seen(NamedTuple):
    """What came of one stretch.

    Attributes:
        outcome: what it is.
        why: if it is not good, half a sentence.
        mark: a checksum that copies of it have as well; None if there is none.
    """

    outcome: Outcome
    why: str = ""
    mark: int | None = None


class BlobCheck:
    """Takes in the bytes of one stretch, in order, and says what it is.

    Args:
        want: what it must be.
        read: reads it anew, should it need a closer look.
    """

    def __init__(self, want: Want, read: Read) -> None:
        self.want, self._read = want, read
        self._outline = _outline(want)
        self._crc, self._at, self._fits = 0, 0, True
        self._after = b""

    def feed(self, data: memoryview) -> None:
        """Take in the next bytes; the first ones hold at least a frame's beginning."""
        frame = self._outline
        if not self._at and frame is not None:
            self._fits = data[: len(frame.before)] == frame.before
        if self.want.crc is not None:
            self._crc = crc32(data, self._crc)
        elif frame is not None and self._fits:
            start = max(0, len(frame.before) - self._at)
            end = len(frame.before) + frame.data_bytes - self._at
            self._crc = crc32(data[start:end], self._crc) if end > start else self._crc
            self._after += bytes(data[max(0, end) :])
        self._at += len(data)

    def end(self) -> Seen:
        """Return what came of it."""
        want, frame = self.want, self._outline
        if want.crc is not None:
            if self._crc != want.crc:
                return Seen("damaged", "has changed since it was written: its checksum differs")
            other = None if frame is not None and self._fits else _another_tensor(want, self._read)
            return Seen("damaged", other) if other else Seen("good", mark=self._crc)
        if want.kind == "transformed":
            return Seen("untold", "is compressed or changed by an extension of DCP's, and has no checksum")
        if frame is not None and self._fits and frame.ends(self._crc, self._after):
            return Seen("good", mark=self._crc)
        return _looked_into(want, self._read)


def _outline(want: Want) -> Outline | None:
    if want.shape is None or want.dtype is None or not has_frame(want.dtype):
        return None
    if not 0 < math.prod(want.shape) * want.dtype.itemsize <= want.length:  # memory that is asked for, if not taken
        return None
    made = outline(want.shape, want.dtype)
    return made if made.length == want.length else None


def _another_tensor(want: Want, read: Read) -> str:
    """Return what a blob says that it is, where that is another tensor than it must be; nothing if it says it not."""
    if want.kind != "tensor":
        return ""
    says = described(read(0, min(HEAD, want.length)))
    if says is None or (says.shape, says.dtype) == (want.shape, want.dtype):
        return ""
    shape, dtype = want.shape, want.dtype
    return f"holds a {_named(says.dtype, says.shape)} where .metadata says {_named(dtype, shape)}"


def _named(dtype: torch.dtype | None, shape: tuple[int, ...] | None) -> str:
    return f"{str(dtype).removeprefix('torch.')} tensor of shape {list(shape or ())}"


def _looked_into(want: Want, read: Read) -> Seen:
    """Account for every byte of an archive."""
    if not is_archive(read, want.length):
        if want.kind == "tensor":
            return Seen("damaged", "is nothing that torch.save writes")
        return Seen("untold", "is nothing that torch.save writes, and has no checksum")
    try:
        records = records_of(read, want.length)
    except LayoutError as error:
        return Seen("damaged", f"is damaged around its values: {error}")
    return _checked(want, records, read)


def _checked(want: Want, records: list[Record], read: Read) -> Seen:
    summed = any(record.crc for record in records)
    for record in records if summed else ():
        if _crc_of(read, record) != record.crc:
            return Seen(
                "damaged", f"has changed since it was written: the checksum of its record {record.name} differs"
            )
    other = _another_tensor(want, read)
    if other:
        return Seen("damaged", other)
    if not summed:
        return Seen("untold", "has no checksum, as torch was told to compute none (set_crc32_options)")
    if want.kind == "tensor" and described(read(0, min(HEAD, want.length))) is None:
        return Seen("untold", "is no plain tensor, so its shape was not compared; its checksums agree")
    own = [record.crc for record in records if record.name == "data/0"] if want.kind == "tensor" else []
    return Seen("good", mark=own[0] if own else hash(tuple(record.crc for record in records)))


def _crc_of(read: Read, record: Record) -> int:
    crc = 0
    for at in range(record.start, record.start + record.size, _WINDOW):
        crc = crc32(read(at, min(_WINDOW, record.start + record.size - at)), crc)
    return crc
