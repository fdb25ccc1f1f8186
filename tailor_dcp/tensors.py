"""Tensors that are read when they are needed, a stretch at a time.

Everything that a conversion moves is a ``Readable``: a size, a dtype, and a way to read any stretch of its
elements in row-major order. So the memory that a conversion takes depends on how much it asks for at a time,
never on how large the checkpoint is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tailor_dcp.open_files import close_files, read_file

__all__ = [
    "Cast",
    "Given",
    "Piece",
    "Readable",
    "Stored",
    "Zeros",
    "cast",
    "close_files",
    "raw_bytes",
    "read_file",
    "same",
]

_STEP = 8 << 20
"""Bytes of tensors that are compared at a time."""


class Readable(ABC):
    """A tensor somewhere.

    Attributes:
        size: its shape.
        dtype: its dtype.
    """

    size: torch.Size
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.size)

    @property
    def bytes(self) -> int:
        """The number of bytes of all elements."""
        return self.count * self.dtype.itemsize

    @property
    def source(self) -> Readable:
        """What is read for it: itself, unless it is made from another one."""
        return self

    @abstractmethod
    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Fill ``out``, 1-D, contiguous, on the CPU and of this dtype, with the elements from ``start`` on.

        Raises:
            DamagedSourceError: they cannot be read.
        """

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the elements from ``start`` to before ``stop`` in row-major order, 1-D."""
        out = torch.empty(stop - start, dtype=self.dtype)
        if stop > start:
            self.read_into(out, start)
        return out

    def whole(self) -> torch.Tensor:
        """Return all of it, in its shape."""
        return self.read(0, self.count).reshape(self.size)


class Piece(NamedTuple):
    """Elements of a tensor that lie in one place of a file, in their order.

    Attributes:
        path: the file.
        offset: the byte where the first of them starts.
        start: the number of the first element in the tensor, in row-major order.
        elements: how many they are.
    """

    path: Path
    offset: int
    start: int
    elements: int


@dataclass(frozen=True, eq=False)
class Stored(Readable):
    """A tensor whose elements lie in files, in pieces that follow each other without gap or overlap."""

    size: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [piece.start for piece in self.pieces]

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read straight from the files into ``out``."""
        width, stop = self.dtype.itemsize, start + out.numel()
        raw = raw_bytes(out)
        for piece in self.pieces[bisect_right(self._starts, start) - 1 :]:
            if piece.start >= stop:
                break
            first, last = max(start, piece.start), min(stop, piece.start + piece.elements)
            into = raw[(first - start) * width : (last - start) * width]
            read_file(piece.path, piece.offset + (first - piece.start) * width, into)


@dataclass(frozen=True, eq=False)
class Given(Readable):
    """A tensor that is in memory."""

    tensor: torch.Tensor

    @property
    def size(self) -> torch.Size:  # type: ignore[override]
        """Its shape."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Its dtype."""
        return self.tensor.dtype

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Copy."""
        out.copy_(self.tensor.reshape(-1)[start : start + out.numel()])


@dataclass(frozen=True, eq=False)
class Zeros(Readable):
    """A tensor of nothing but zeros."""

    size: torch.Size
    dtype: torch.dtype

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Fill with zeros."""
        out.zero_()


@dataclass(frozen=True, eq=False)
class Cast(Readable):
    """A tensor in another dtype."""

    inner: Readable
    dtype: torch.dtype

    @property
    def size(self) -> torch.Size:  # type: ignore[override]
        """Its shape."""
        return self.inner.size

    @property
    def source(self) -> Readable:
        """The tensor that is converted."""
        return self.inner.source

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read and convert."""
        out.copy_(self.inner.read(start, start + out.numel()))


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a 1-D contiguous tensor on the CPU."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)


def cast(tensor: Readable, dtype: torch.dtype | None) -> Readable:
    """Return the tensor in a dtype; itself if it has that already, or is not of floating point."""
    if dtype is None or tensor.dtype == dtype or not tensor.dtype.is_floating_point:
        return tensor
    return Cast(tensor, dtype)


def same(one: Readable, other: Readable) -> bool:
    """Tell whether two tensors hold the same values, a stretch at a time."""
    if one is other:
        return True
    if (one.size, one.dtype) != (other.size, other.dtype):
        return False
    step = _STEP // one.dtype.itemsize
    spans = ((start, min(start + step, one.count)) for start in range(0, one.count, step))
    return all(torch.equal(one.read(*span), other.read(*span)) for span in spans)
