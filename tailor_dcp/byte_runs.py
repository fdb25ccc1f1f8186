"""Byte runs: how a box cut out of a row-major tensor lies in a file and in memory. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Box(NamedTuple):
    """A part of a stored tensor.

    Attributes:
        stored: the shape of the row-major tensor.
        offsets: the part's first element there, one number a dimension.
        lengths: the part's shape.
    """

    stored: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def is_rows(self) -> bool:
        """Whether it is whole outermost rows."""
        return self.lengths[1:] == self.stored[1:]

    @property
    def shortest_run(self) -> int:
        """The number of elements that lie together in the stored tensor."""
        run = 1
        for length, size in zip(reversed(self.lengths), reversed(self.stored), strict=True):
            run *= length
            if length != size:
                break
        return run

    def widened(self) -> Box:
        """Return the whole outermost rows that it lies in."""
        if not self.lengths:
            return self
        zeros = (0,) * (len(self.lengths) - 1)
        return Box(self.stored, (self.offsets[0], *zeros), (self.lengths[0], *self.stored[1:]))


class Runs(NamedTuple):
    """Stretches of elements that are contiguous in both places, all of one length.

    Attributes:
        sources: the number of each stretch's first element in the stored tensor, ascending.
        targets: where it goes, in elements from the target's first.
        length: elements of each stretch.
    """

    sources: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    length: int


def runs_of(box: Box, strides: Sequence[int]) -> Runs | None:
    """Return the stretches of a box.

    Args:
        box: the part of the stored tensor.
        strides: of the tensor that it goes into, in elements.

    Returns:
        The stretches; None if the target does not keep even the innermost elements together.
    """
    stored, offsets, lengths = box
    if not lengths:
        return Runs(np.zeros(1, np.int64), np.zeros(1, np.int64), 1)
    here = [math.prod(stored[dim + 1 :]) for dim in range(len(stored))]
    inner, length = len(lengths), 1
    while inner and (lengths[inner - 1] == 1 or strides[inner - 1] == here[inner - 1] == length):
        inner -= 1
        length *= lengths[inner]
    if inner == len(lengths):
        return None
    sources = np.full(1, sum(o * s for o, s in zip(offsets, here, strict=True)), np.int64)
    targets = np.zeros(1, np.int64)
    for dim in range(inner):
        steps = np.arange(lengths[dim], dtype=np.int64)
        sources = (sources[:, None] + steps * here[dim]).reshape(-1)
        targets = (targets[:, None] + steps * strides[dim]).reshape(-1)
    return Runs(sources, targets, length)
