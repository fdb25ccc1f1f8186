"""SCE: select the elements that the models vary in, calculate the models' weights, erase what disagrees in sign."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.blocks import flat_blocks
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.ranks import smallest
from tailor_dcp.methods.task_vectors import agreeing

_TINY = 1e-6


@merge_method(
    paper="Wan et al., FuseChat, https://arxiv.org/abs/2408.07990",
    # int8_mask says only how much memory mergekit takes.
    parameters=[Parameter("int8_mask", False, bool), Parameter("select_topk", 1.0)],
    base="needed",
)
def sce(request: Request) -> torch.Tensor:
    """Return the base model plus a mean of task vectors, weighed by their mean squares.

    Only the share ``select_topk`` of the elements that vary between the task vectors, those with the most variance,
    is changed. Where task vectors disagree in sign, those that oppose their sum are left out.
    """
    base, share = request.base_tensor, request.parameters["select_topk"]
    if not request.others or share <= 0:
        return base
    left_out = _least_varied(request, share)
    weights = _weights(request, left_out)
    result = torch.empty(base.shape, dtype=base.dtype)
    for (out, origin, skip), deltas in zip(flat_blocks(result, base, left_out), _deltas(request), strict=True):
        deltas.masked_fill_(skip, 0)
        kept = weights * agreeing(deltas)
        total = (deltas * kept).sum(dim=0).div_(kept.sum(dim=0).clamp_(min=_TINY))
        torch.add(origin, total.to(base.dtype), out=out)
    return result


def _deltas(request: Request) -> Iterator[torch.Tensor]:
    """Give the task vectors a stretch at a time, (models, elements)."""
    for origin, *parts in flat_blocks(request.base_tensor, *(given.tensor for given in request.others)):
        yield torch.stack(parts).sub_(origin)


def _least_varied(request: Request, share: float) -> torch.Tensor:
    """Mark the elements that are not selected."""
    base = request.base_tensor
    if share >= 1:
        return torch.zeros(base.shape, dtype=torch.bool)
    variance = torch.empty(base.shape, dtype=base.dtype)
    for (out,), deltas in zip(flat_blocks(variance), _deltas(request), strict=True):
        torch.var(deltas, dim=0, correction=0, out=out)
    # In fp32, as 0.7 of ten elements would be six otherwise.
    selected = int(torch.count_nonzero(variance) * share)
    return smallest(variance, variance.numel() - selected)


def _weights(request: Request, left_out: torch.Tensor) -> torch.Tensor:
    """Return the models' weights, (models, 1): shares of their mean squares, equal ones where these are tiny."""
    squares = torch.zeros(len(request.others), dtype=torch.float64)
    for (skip,), deltas in zip(flat_blocks(left_out), _deltas(request), strict=True):
        squares += deltas.double().masked_fill_(skip, 0).square_().sum(dim=1)
    squares /= left_out.numel()
    total = squares.sum()
    shares = torch.full_like(squares, 1 / len(squares)) if total < _TINY else squares / total
    return shares.to(torch.float64 if request.base_tensor.dtype == torch.float64 else torch.float32)[:, None]
