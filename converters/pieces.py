"""Pieces: the places in files where a tensor's elements lie exactly as they are in memory, if they do."""

from __future__ import annotations

from collections.abc import Iterator

from tailor_dcp.tensors import Piece, Readable, Stored

from .streams import Stream
from .views import Reshaped, Strips

_MOST = 64
_LONG = 1 << 20
"""Bytes; a tensor may have one piece more than those 64 for each of these, as joined experts have."""


class _NotInPlaceError(Exception):
    """Some elements are elsewhere, or in another order, or in too many places."""


def pieces_of(tensor: Readable) -> tuple[Piece, ...] | None:
    """Return where a tensor's elements lie, in their order; None if they are not in files as they are in memory.

    Nor if that is in many short pieces, as those of a tensor that was cut out of the columns of another.
    """
    if not tensor.count:
        return None
    found: list[Piece] = []
    most = max(_MOST, tensor.bytes // _LONG)
    try:
        for piece in _within(tensor, 0, tensor.count):
            _add(found, piece, tensor.dtype.itemsize)
            if len(found) > most:
                return None
    except _NotInPlaceError:
        return None
    return tuple(found)


def _add(found: list[Piece], piece: Piece, width: int) -> None:
    """Add a piece, or make the last one longer."""
    if found:
        path, offset, start, elements = found[-1]
        if piece.path == path and piece.offset == offset + elements * width:
            found[-1] = Piece(path, offset, start, elements + piece.elements)
            return
        piece = piece._replace(start=start + elements)
    found.append(piece)


def _within(tensor: Readable, first: int, count: int) -> Iterator[Piece]:
    """Yield where some of a tensor's elements lie, numbered from the first of them on."""
    if isinstance(tensor, Reshaped):
        yield from _within(tensor.inner, first, count)
    elif isinstance(tensor, Stored):
        yield from _of_stored(tensor, first, count)
    elif isinstance(tensor, Stream):
        at = 0
        for inner, start, length in tensor.parts:
            low, high = max(first, at), min(first + count, at + length)
            if low < high:
                yield from _within(inner, start + low - at, high - low)
            at += length
    elif isinstance(tensor, Strips):
        yield from _of_strips(tensor, first, count)
    else:
        raise _NotInPlaceError


def _of_stored(tensor: Stored, first: int, count: int) -> Iterator[Piece]:
    for piece in tensor.pieces:
        low, high = max(first, piece.start), min(first + count, piece.start + piece.elements)
        if low < high:
            offset = piece.offset + (low - piece.start) * tensor.dtype.itemsize
            yield Piece(piece.path, offset, low - first, high - low)


def _of_strips(tensor: Strips, first: int, count: int) -> Iterator[Piece]:
    whole = sum(strip.length for strip in tensor.strips)
    turn, at = divmod(first, whole)
    at, end = turn * whole, first + count
    while at < end:
        for inner, start, step, length in tensor.strips:
            low, high = max(first, at), min(end, at + length)
            if low < high:
                yield from _within(inner, start + turn * step + low - at, high - low)
            at += length
        turn += 1
