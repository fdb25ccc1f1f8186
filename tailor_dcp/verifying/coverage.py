"""Coverage: whether boxes fill a tensor, each of its elements exactly once. Pure arithmetic.

A box is a sum of signed corners: the function that is 1 within it and 0 elsewhere has, differenced once along each
dimension, a 1 or a -1 at each of its corners and 0 everywhere else. Boxes fill the whole exactly once if and only if
their corners add up to those of the whole. So all is a sort of corners, however the boxes lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_LARGEST = 1 << 62
_MOST = 1 << 24
"""Corners that are looked at, in about a GiB; half a million chunks cut along five dimensions have as many."""


class Miscovered(NamedTuple):
    """The first element, in row-major order, that is not covered once.

    Attributes:
        element: its index, a number a dimension.
        times: how often it is covered.
    """

    element: tuple[int, ...]
    times: int


def miscovered(size: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Miscovered | None:
    """Return where boxes do not fill a tensor exactly once; None if they do.

    Args:
        size: the tensor's.
        boxes: offsets and sizes of each; all lie within the tensor.

    Raises:
        TooManyCornersError: they are cut along so many dimensions that it would take more memory than there is.
    """
    whole = tuple(size)
    if len(boxes) == 1 and tuple(boxes[0][1]) == whole:  # nearly all tensors of small jobs, and it lies within
        return None
    if not whole:
        count = len(boxes)
        return None if count == 1 else Miscovered((), count)
    filled = [(offsets, sizes) for offsets, sizes in boxes if math.prod(sizes)]
    if not math.prod(whole):
        return None
    starts = np.array([*(offsets for offsets, _ in filled), (0,) * len(whole)], np.int64)
    ends = starts + np.array([*(sizes for _, sizes in filled), whole], np.int64)
    cut = np.flatnonzero((starts != 0).any(0) | (ends != whole).any(0))  # along the others, all boxes are the whole
    if len(starts) << len(cut) > _MOST:
        raise TooManyCornersError
    odd = _first_odd(starts[:, cut], ends[:, cut])
    if odd is None:
        return None
    element = np.zeros(len(whole), np.int64)
    element[cut] = odd.element
    return Miscovered(tuple(element.tolist()), odd.times)


class TooManyCornersError(Exception):
    """A tensor is cut along more dimensions than any is."""


def _first_odd(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Miscovered | None:
    """Return where boxes do not fill the last of them exactly once."""
    dims = starts.shape[1]
    weights = np.ones(len(starts), np.int64)
    weights[-1] = -1  # the whole is taken away
    ranked = [_ranked(starts[:, dim], ends[:, dim]) for dim in range(dims)]
    codes, signs = _corners([one[1:] for one in ranked], [len(one.known) for one in ranked], weights)
    order = np.argsort(codes, kind="stable")
    codes, signs = codes[order], signs[order]
    first = np.flatnonzero(np.concatenate(([True], codes[1:] != codes[:-1])))
    sums = np.add.reduceat(signs, first)
    odd = np.flatnonzero(sums)
    if not len(odd):
        return None
    # In row-major order nothing before this corner is odd, so here the boxes are too many or too few by just this.
    corner = order[first[odd[0]]]
    which, row = divmod(int(corner), len(starts))
    bits = list(product((0, 1), repeat=dims))[which]
    element = tuple(int((ends if bit else starts)[row, dim]) for dim, bit in enumerate(bits))
    return Miscovered(element, 1 + int(sums[odd[0]]))


class _Ranked(NamedTuple):
    known: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def _ranked(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> _Ranked:
    """Number the places along a dimension where anything begins or ends."""
    known, ranks = np.unique(np.concatenate([starts, ends]), return_inverse=True)
    return _Ranked(known, ranks[: len(starts)], ranks[len(starts) :])


def _corners(
    ranks: Iterable[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    lengths: Sequence[int],
    weights: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return a number for the place of each corner, in row-major order, and the corner's sign."""
    codes, signs, highest = np.zeros((1, len(weights)), np.int64), weights[None], 1
    for (starts, ends), length in zip(ranks, lengths, strict=True):
        if highest * length > _LARGEST:  # number anew what there is
            known, ranked = np.unique(codes.reshape(-1), return_inverse=True)
            codes, highest = ranked.astype(np.int64).reshape(-1, len(weights)), len(known)
        highest *= length
        codes = np.stack([codes * length + starts, codes * length + ends], 1).reshape(-1, len(weights))
        signs = np.stack([signs, -signs], 1).reshape(-1, len(weights))
    return codes.reshape(-1), signs.reshape(-1)
