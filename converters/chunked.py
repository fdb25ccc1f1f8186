"""Tensors that a DCP checkpoint stores in chunks, read by stretches of rows."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.flat_boxes import Box, boxes
from tailor_dcp.frames import frame
from tailor_dcp.open_checkpoint import Checkpoint
from tailor_dcp.raw_stretch import bytes_of, is_raw
from tailor_dcp.tensors import Piece, Readable, Stored, raw_bytes, read_file


class Chunk(NamedTuple):
    """A chunk of a tensor, and the blob that it is stored in."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    info: _StorageInfo


@dataclass(frozen=True, eq=False)
class Chunked(Readable):
    """A tensor that a DCP checkpoint stores in chunks, sorted by their offsets."""

    size: torch.Size
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    key: str
    checkpoint: Checkpoint
    _raw: dict[tuple[int, ...], int | None] = field(default_factory=dict)
    _last: threading.local = field(default_factory=threading.local)

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read the rows that the elements lie in, straight into their places where chunks hold whole rows."""
        stop, row = start + out.numel(), math.prod(self.size[1:])
        if not out.numel():
            return
        first, last = (start // row, -(-stop // row)) if self.size else (0, 1)
        touched = [c for c in self.chunks if not self.size or _meets(c, first, last)]
        if all(chunk.sizes[1:] == self.size[1:] for chunk in touched):
            for chunk in touched:
                begin = chunk.offsets[0] * row if self.size else 0
                low, high = max(start, begin), min(stop, begin + math.prod(chunk.sizes))
                if low < high:
                    self._read_chunk(chunk, out[low - start : high - start], low - begin)
            return
        rows = torch.empty((last - first, *self.size[1:]), dtype=self.dtype)
        for chunk in touched:
            self._place(chunk, rows, first, last)
        out.copy_(rows.reshape(-1)[start - first * row : stop - first * row])

    def _place(self, chunk: Chunk, rows: torch.Tensor, first: int, last: int) -> None:
        """Read a chunk's part of some rows of the tensor."""
        low = max(first, chunk.offsets[0])
        high = min(last, chunk.offsets[0] + chunk.sizes[0])
        inner = math.prod(chunk.sizes[1:])
        part = torch.empty((high - low) * inner, dtype=self.dtype)
        self._read_chunk(chunk, part, (low - chunk.offsets[0]) * inner)
        box = [slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
        rows[(slice(low - first, high - first), *box)] = part.reshape(high - low, *chunk.sizes[1:])

    def _read_chunk(self, chunk: Chunk, out: torch.Tensor, start: int) -> None:
        """Read elements of one chunk in its own row-major order."""
        if not out.numel():
            return
        if chunk.offsets not in self._raw:
            self._raw[chunk.offsets] = self._data_offset(chunk)
        offset = self._raw[chunk.offsets]
        if offset is not None:
            read_file(chunk.path, offset + start * self.dtype.itemsize, raw_bytes(out))
        else:
            out.copy_(self._unpickled(chunk)[start : start + out.numel()])

    def _data_offset(self, chunk: Chunk) -> int | None:
        """Return where the chunk's bytes start in the file, if they lie there as they are in memory."""
        if is_raw(chunk.info):
            if bytes_of(chunk.sizes, self.dtype) != chunk.info.length:
                raise DamagedSourceError(f"{chunk.path} does not hold what its checkpoint says of {self.key}.")
            return chunk.info.offset
        if chunk.info.transform_descriptors:
            return None
        before, after = frame(chunk.sizes, self.dtype, 0)
        if len(before) + math.prod(chunk.sizes) * self.dtype.itemsize + len(after) != chunk.info.length:
            return None
        head = bytearray(len(before))
        read_file(chunk.path, chunk.info.offset, memoryview(head))
        # The head holds the pickle, and with it shape, strides and dtype.
        return chunk.info.offset + len(before) if head == before else None

    def raw_piece(self, chunk: Chunk) -> Piece | None:
        """Return a raw stretch as elements that follow each other; None if it is a box that has gaps between them.

        Raises:
            DamagedSourceError: it has not the bytes of its chunk.
        """
        offset = self._data_offset(chunk)
        assert offset is not None
        strides = [math.prod(self.size[dim + 1 :]) for dim in range(len(self.size))]
        start = sum(first * stride for first, stride in zip(chunk.offsets, strides, strict=True))
        count = math.prod(chunk.sizes)
        if not count or [Box(chunk.offsets, chunk.sizes)] != list(boxes(start, count, self.size)):
            return None
        return Piece(chunk.path, offset, start, count)

    def _unpickled(self, chunk: Chunk) -> torch.Tensor:
        """Return a chunk as torch.load reads it, 1-D; each thread keeps its last one, as windows come in order."""
        if getattr(self._last, "chunk", None) is not chunk:
            loaded = self.checkpoint.blob(self.key, chunk.info)
            if not isinstance(loaded, torch.Tensor) or loaded.shape != chunk.sizes or loaded.dtype != self.dtype:
                raise DamagedSourceError(f"{chunk.path} does not hold what its checkpoint says of {self.key}.")
            self._last.chunk, self._last.tensor = chunk, loaded.contiguous().reshape(-1)
        tensor: torch.Tensor = self._last.tensor
        return tensor


def in_place(tensor: Chunked) -> Stored | None:
    """Return a tensor whose chunks are all raw stretches, in the order of its elements; None if they are not.

    Raises:
        DamagedSourceError: a stretch has not the bytes of its chunk.
    """
    if not tensor.chunks or not all(is_raw(chunk.info) for chunk in tensor.chunks):
        return None
    pieces = [tensor.raw_piece(chunk) for chunk in tensor.chunks]
    ordered = sorted((piece for piece in pieces if piece is not None), key=lambda piece: piece.start)
    ends = [0, *accumulate(piece.elements for piece in ordered)]
    if len(ordered) < len(pieces) or [piece.start for piece in ordered] != ends[:-1] or ends[-1] != tensor.count:
        return None
    return Stored(tensor.size, tensor.dtype, tuple(ordered))


def _meets(chunk: Chunk, first: int, last: int) -> bool:
    return chunk.offsets[0] < last and chunk.offsets[0] + chunk.sizes[0] > first
