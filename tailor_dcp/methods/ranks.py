"""Which elements of a tensor are the smallest, without sorting it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tailor_dcp.methods.blocks import flat_blocks, precise


def at_ranks(values: torch.Tensor, ranks: Sequence[int]) -> list[float]:
    """Return the elements that stand at some places, counted from 0, when all are sorted in ascending order."""
    # A partition takes linear time, and no indices as torch's sort and kthvalue do.
    array = values.reshape(-1).to(precise(values.dtype), copy=True).numpy()
    array.partition(sorted(set(ranks)))
    return [float(array[rank]) for rank in ranks]


def smallest(values: torch.Tensor, count: int, *, last: bool = False) -> torch.Tensor:
    """Mark the smallest elements.

    Args:
        values: any shape and floating-point dtype.
        count: how many to mark.
        last: which of several equal ones to mark where not all are: the last instead of the first.

    Returns:
        A bool tensor of the same shape.
    """
    if not 0 < count < values.numel():
        return torch.full(values.shape, count > 0, dtype=torch.bool)
    (limit,) = at_ranks(values, [count - 1])
    marked = values <= limit if last else values < limit
    wrong = abs(count - int(marked.sum()))
    for part, marks in flat_blocks(values, marked):
        if not wrong:
            break
        equal = (part == limit).nonzero()[:wrong, 0]
        marks[equal] = not last
        wrong -= len(equal)
    return marked
