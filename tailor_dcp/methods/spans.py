"""Combinations of vectors whose weights depend on lengths and angles alone.

Means on a sphere stay within the span of what they average. So all that they take is the vectors' dot products, a
few numbers, and one weighted sum, however often the mean is iterated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from tailor_dcp.methods.blocks import BLOCK, precise

Weigh = Callable[[torch.Tensor], torch.Tensor]
"""Makes weights (rows, vectors) of dot products (rows, vectors, vectors), all fp64."""


def combined(
    tensors: Sequence[torch.Tensor], weigh: Weigh, *, origin: torch.Tensor | None = None, along: int | None = None
) -> torch.Tensor:
    """Return weighted sums of vectors, the weights being made of the vectors' dot products.

    Args:
        tensors: of one shape and dtype.
        weigh: makes the weights.
        origin: what the vectors start from, of the same shape; None for zero.
        along: the dimension that vectors lie along; None if each tensor is one vector as a whole.

    Returns:
        The origin plus the weighted sum of what differs from it, in the tensors' shape and dtype; computed in fp32
        (fp64 for fp64), the dot products in fp64.
    """
    given = tensors[0]
    if along is None or given.ndim < 2:
        rows = [tensor.reshape(1, -1) for tensor in (*tensors, *_maybe(origin))]
        return _in_rows(rows, weigh, origin is not None).reshape(given.shape)
    turned = [tensor.transpose(along, -1) for tensor in (*tensors, *_maybe(origin))]
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in turned]
    result = _in_rows(rows, weigh, origin is not None)
    return result.reshape(turned[0].shape).transpose(along, -1).contiguous()


def _maybe(tensor: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if tensor is None else (tensor,)


def _in_rows(tensors: list[torch.Tensor], weigh: Weigh, from_origin: bool) -> torch.Tensor:
    """Combine tensors of shape (rows, length) row by row; the last of them may be the origin."""
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    some = max(1, BLOCK // max(1, result.shape[1]))
    for out, *parts in zip(*(torch.split(tensor, some) for tensor in (result, *tensors)), strict=True):
        weights = weigh(_dots(parts, from_origin)).to(precise(result.dtype))
        for piece, *pieces in _columns(out, *parts):
            # By differences, so that what differs nowhere stays as it is, to the bit.
            start = pieces.pop().to(weights.dtype) if from_origin else None
            total = torch.zeros(piece.shape, dtype=weights.dtype)
            for index, other in enumerate(pieces):
                exact = other.to(weights.dtype)
                total.addcmul_(exact if start is None else exact - start, weights[:, index : index + 1])
            piece.copy_(total if start is None else total.add_(start))
    return result


def _dots(parts: list[torch.Tensor], from_origin: bool) -> torch.Tensor:
    """Return the dot products of what differs from the origin, (rows, vectors, vectors)."""
    vectors = len(parts) - from_origin
    dots = torch.zeros(parts[0].shape[0], vectors, vectors, dtype=torch.float64)
    for pieces in _columns(*parts):
        # Angles near 0 and 180 degrees leave nothing of fp32's precision: their sines need fp64.
        stacked = torch.stack([piece.double() for piece in pieces], dim=1)
        if from_origin:
            stacked = stacked[:, :-1] - stacked[:, -1:]
        dots += stacked @ stacked.mT
    return dots


def _columns(*parts: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    yield from zip(*(torch.split(part, BLOCK, dim=1) for part in parts), strict=True)
