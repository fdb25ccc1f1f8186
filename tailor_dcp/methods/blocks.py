"""Working on large tensors a stretch at a time, in a precision of one's own, with little memory beside the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

BLOCK = 1 << 18
"""Elements of each tensor that are worked on at a time: several of them fit a core's cache."""


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return what sums and products of tensors of a dtype are computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flat_blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Cut tensors of one size into 1-D views of the same elements each; those of a contiguous tensor can be set."""
    yield from zip(*(torch.split(tensor.reshape(-1), BLOCK) for tensor in tensors), strict=True)


def combination(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted sum of tensors of one shape and dtype, in that dtype, rounded once."""
    result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype)
    exact = precise(result.dtype)
    for out, *parts in flat_blocks(result, *tensors):
        total = parts[0].to(exact) * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        out.copy_(total)
    return result
