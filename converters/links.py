"""Links: which chunks of a catalog's tensors can be pointed to where they lie, and where that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from weakref import ref

from tailor_dcp.catalog import Catalog
from tailor_dcp.flat_boxes import Box, boxes
from tailor_dcp.tensors import Piece, Readable

from .dcp_state import CHUNK, rows_of
from .dcp_state import Box as Chunk
from .pieces import pieces_of

_SMALL = 1 << 12
"""Bytes; nobody wants to know where smaller tensors go."""


class Place(NamedTuple):
    """Where a chunk lies.

    Attributes:
        path: the file.
        offset: its first byte there.
        length: its bytes.
        sizes: its shape.
    """

    path: Path
    offset: int
    length: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Links:
    """What of a catalog is pointed to.

    Attributes:
        chunks: by the ``id`` of a tensor, the places of its chunks by their offsets.
        others: keys of larger tensors that must be written.
        files: the files that are pointed into.
    """

    chunks: Mapping[int, Mapping[tuple[int, ...], Place]]
    others: tuple[str, ...]
    files: tuple[Path, ...]

    def cut(self, tensor: Readable) -> list[Chunk]:
        """Return a tensor's chunks."""
        places = self.chunks.get(id(tensor))
        return rows_of(tensor) if places is None else [(offsets, place.sizes) for offsets, place in places.items()]


def links_of(catalog: Catalog) -> Links:
    """Return what can be pointed to where it lies; whoever tells of it before it is done asks twice."""
    if _last.of is None or _last.of() is not catalog:
        _last.of, _last.links = ref(catalog), _found(catalog)
    return _last.links


class _Last:
    of: ref[Catalog] | None = None
    links = Links({}, (), ())


_last = _Last()


def _found(catalog: Catalog) -> Links:
    """Find what can be pointed to.

    Stretches that lie over each other, as of views of one tensor that were saved as two, are pointed to once: whoever
    reads a checkpoint may take it that each byte is of one tensor.
    """
    keys = {id(tensor): key for key, tensor in reversed(catalog.tensors.items())}
    tensors = {id(tensor): tensor for tensor in catalog.tensors.values()}
    found = {
        number: dict(_places(tensor, pieces)) for number, tensor in tensors.items() if (pieces := pieces_of(tensor))
    }
    for number in _overlapping(found):
        del found[number]
    others = tuple(keys[n] for n, t in tensors.items() if n not in found and t.bytes > _SMALL)
    files = dict.fromkeys(place.path for places in found.values() for place in places.values())
    return Links(found, others, tuple(files))


def _places(tensor: Readable, pieces: tuple[Piece, ...]) -> Iterator[tuple[tuple[int, ...], Place]]:
    """Yield the chunks of a tensor that lies in pieces: these end in the middle of rows, DCP's chunks are boxes."""
    width = tensor.dtype.itemsize
    for piece in pieces:
        offset = piece.offset
        for box in boxes(piece.start, piece.elements, tensor.size):
            for offsets, sizes in _cut(box, width):
                length = math.prod(sizes) * width
                yield offsets, Place(piece.path, offset, length, sizes)
                offset += length


def _cut(box: Box, width: int) -> Iterator[Box]:
    """Cut a large box along the dimension in which it can be, so that ranks can share it."""
    dim = next((dim for dim, size in enumerate(box.sizes) if size > 1), None)
    if dim is None:
        yield box
        return
    step = max(1, CHUNK // (math.prod(box.sizes[dim + 1 :]) * width))
    for start in range(0, box.sizes[dim], step):
        offsets = (*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :])
        yield Box(offsets, (*box.sizes[:dim], min(step, box.sizes[dim] - start), *box.sizes[dim + 1 :]))


def _overlapping(found: Mapping[int, Mapping[tuple[int, ...], Place]]) -> set[int]:
    """Return tensors that have bytes of others, all but the first of each."""
    stretches = sorted(
        (str(place.path), place.offset, place.offset + place.length, number)
        for number, places in found.items()
        for place in places.values()
    )
    lost: set[int] = set()
    path, end = "", 0
    for name, start, stop, number in stretches:
        if name != path:
            path, end = name, 0
        if start < end:
            lost.add(number)
        elif number not in lost:
            end = stop
    return lost
