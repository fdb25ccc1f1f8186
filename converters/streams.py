"""Streams: stretches of tensors, one after the other, as one tensor; the way flat buffers are put together and cut."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from tailor_dcp.tensors import Piece, Readable, Stored, Zeros


class Part(NamedTuple):
    """A stretch of a tensor.

    Attributes:
        tensor: the tensor.
        start: its first element, in row-major order.
        length: how many elements.
    """

    tensor: Readable
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Stream(Readable):
    """A tensor made of parts that follow each other."""

    size: torch.Size
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(part.length for part in self.parts)][:-1]

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Let each part fill its own stretch of ``out``."""
        stop = start + out.numel()
        first = bisect_right(self._starts, start) - 1
        for at, part in zip(self._starts[first:], self.parts[first:], strict=True):
            if at >= stop:
                break
            low, high = max(start, at), min(stop, at + part.length)
            part.tensor.read_into(out[low - start : high - start], part.start + low - at)


def stream(size: Sequence[int], dtype: torch.dtype, parts: Iterable[Part]) -> Readable:
    """Return the tensor that parts make up; what lies in files as a whole is read from there without a detour.

    Args:
        size: its shape.
        dtype: its dtype, which all parts must have.
        parts: the parts, in their order. Empty ones are left out.

    Raises:
        ValueError: they do not add up to the size, reach beyond their tensors, or differ in dtype.
    """
    kept = tuple(part for part in parts if part.length)
    if sum(part.length for part in kept) != math.prod(size):
        raise ValueError(f"Parts of {sum(part.length for part in kept)} elements do not make up {tuple(size)}.")
    for tensor, start, count in kept:
        if tensor.dtype != dtype or start < 0 or start + count > tensor.count:
            raise ValueError(
                f"Elements {start} to {start + count} of {tensor.count} {tensor.dtype} are no part of {dtype}."
            )
    if not kept:
        return Zeros(torch.Size(size), dtype)
    if all(isinstance(part.tensor, Stored) for part in kept):
        return Stored(torch.Size(size), dtype, tuple(_pieces(kept)))
    return Stream(torch.Size(size), dtype, kept)


def _pieces(parts: Iterable[Part]) -> Iterable[Piece]:
    at = 0
    for tensor, first, count in parts:
        assert isinstance(tensor, Stored)
        for piece in tensor.pieces:
            low, high = max(first, piece.start), min(first + count, piece.start + piece.elements)
            if low < high:
                offset = piece.offset + (low - piece.start) * tensor.dtype.itemsize
                yield Piece(piece.path, offset, at + low - first, high - low)
        at += count
