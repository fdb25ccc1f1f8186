"""Flat intervals of a tensor as boxes: how a shard that was cut in flat order becomes ordinary DCP chunks.

ZeRO cuts parameters without regard to their dimensions. DCP knows only boxes: offsets and sizes,
one a dimension. Pure arithmetic; nothing here knows of tensors or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A part of a tensor whose elements lie one after the other in flat order.

    Attributes:
        offsets: where it starts, one number a dimension, in elements.
        sizes: how far it reaches, one number a dimension, in elements.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(start: int, length: int, size: Sequence[int]) -> Iterator[Box]:
    """Cut a flat interval of a row-major tensor into boxes, in flat order.

    Each box is the biggest that begins where the one before it ended. On the way in they grow, at most one for
    each dimension but the first; on the way out they shrink likewise: at most ``2 * len(size) - 1`` in
    all (one for a tensor without dimensions).

    Args:
        start: the interval's first element.
        length: how many elements it has.
        size: the tensor's size.

    Raises:
        ValueError: the interval is not within the tensor.
    """
    if start < 0 or length < 0 or start + length > math.prod(size):
        raise ValueError(f"Elements {start} to {start + length} are no part of a tensor of size {tuple(size)}.")
    strides = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
    end = start + length
    while start < end:
        offsets = tuple(start // stride % whole for stride, whole in zip(strides, size, strict=True))
        sizes = _biggest(start, end, size, strides, offsets)
        yield Box(offsets, sizes)
        start += math.prod(sizes)


def _biggest(
    start: int, end: int, size: Sequence[int], strides: Sequence[int], offsets: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the sizes of the biggest box that begins at ``start``: one dimension varies, those after it are full."""
    for dim, stride in enumerate(strides):
        if start % stride == 0 and start + stride <= end:
            reach = min(size[dim] - offsets[dim], (end - start) // stride)
            return (*(1 for _ in range(dim)), reach, *size[dim + 1 :])
    return ()  # a tensor without dimensions: the last one has the stride 1, which always fits
