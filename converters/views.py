"""Tensors made of parts of others, in another order, without any of them being in memory."""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from tailor_dcp.tensors import Readable


class Strip(NamedTuple):
    """What a tensor takes from another in every round.

    Attributes:
        tensor: the other one.
        first: its first element of the first round.
        step: how far the next round's first element is from that.
        length: how many elements a round takes.
    """

    tensor: Readable
    first: int
    step: int
    length: int


@dataclass(frozen=True, eq=False)
class Strips(Readable):
    """A tensor whose elements come from others in turn, again and again: what joining and cutting tensors makes."""

    size: torch.Size
    dtype: torch.dtype
    strips: tuple[Strip, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(strip.length for strip in self.strips))

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read what each round takes."""
        done = 0
        while done < out.numel():
            turn, within = divmod(start + done, self._ends[-1])
            number = bisect_right(self._ends, within)
            strip = self.strips[number]
            skipped = within - (self._ends[number] - strip.length)
            count = min(strip.length - skipped, out.numel() - done)
            strip.tensor.read_into(out[done : done + count], strip.first + turn * strip.step + skipped)
            done += count


@dataclass(frozen=True, eq=False)
class Reordered(Readable):
    """A tensor with its dimensions in another order; the outer ones that stay are read one index at a time."""

    inner: Readable
    order: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Its dtype."""
        return self.inner.dtype

    @cached_property
    def size(self) -> torch.Size:  # type: ignore[override]
        """Its shape."""
        return torch.Size(self.inner.size[dim] for dim in self.order)

    @cached_property
    def _kept(self) -> int:
        """How many of the outermost dimensions are in their places."""
        return next((i for i, dim in enumerate(self.order) if dim != i), len(self.order))

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read the blocks that hold the elements."""
        length = math.prod(self.size[self._kept :])
        done = 0
        while done < out.numel():
            number, within = divmod(start + done, length)
            count = min(length - within, out.numel() - done)
            out[done : done + count] = self._block(number, length)[within : within + count]
            done += count

    def _block(self, number: int, length: int) -> torch.Tensor:
        if getattr(_last, "of", None) != (self, number):
            block = self.inner.read(number * length, (number + 1) * length)
            kept = self._kept
            block = block.reshape(self.inner.size[kept:]).permute([dim - kept for dim in self.order[kept:]])
            _last.block, _last.of = block.reshape(-1), (self, number)
        held: torch.Tensor = _last.block
        return held


_last = threading.local()
"""The block that a thread has read last, of whatever tensor: windows come in order, and blocks can be large."""


@dataclass(frozen=True, eq=False)
class Reshaped(Readable):
    """A tensor's elements in another shape."""

    inner: Readable
    size: torch.Size

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Its dtype."""
        return self.inner.dtype

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read the same elements."""
        self.inner.read_into(out, start)


def joined_along(dim: int, tensors: Sequence[Readable]) -> Readable:
    """Return what ``torch.cat`` makes of tensors."""
    size = list(tensors[0].size)
    size[dim] = sum(tensor.size[dim] for tensor in tensors)
    rows = [math.prod(tensor.size[dim:]) for tensor in tensors]
    strips = tuple(Strip(tensor, 0, row, row) for tensor, row in zip(tensors, rows, strict=True) if row)
    return Strips(torch.Size(size), tensors[0].dtype, strips)


def part_along(dim: int, tensor: Readable, start: int, stop: int) -> Readable:
    """Return the part of a tensor between two indexes of a dimension."""
    size = list(tensor.size)
    inner = math.prod(size[dim + 1 :])
    strip = Strip(tensor, start * inner, size[dim] * inner, (stop - start) * inner)
    size[dim] = stop - start
    return Strips(torch.Size(size), tensor.dtype, (strip,))


def reordered(tensor: Readable, order: Sequence[int]) -> Readable:
    """Return what ``torch.permute`` makes of a tensor; itself if nothing moves."""
    return tensor if list(order) == list(range(len(order))) else Reordered(tensor, tuple(order))


def reshaped(tensor: Readable, size: Sequence[int]) -> Readable:
    """Return the tensor's elements in another shape; itself if it has that already."""
    return tensor if tuple(tensor.size) == tuple(size) else Reshaped(tensor, torch.Size(size))
