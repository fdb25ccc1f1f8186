"""Arcee Fusion: the elements of another model that matter most, the base model's elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tailor_dcp.methods.base import Request
from tailor_dcp.methods.blocks import BLOCK
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.ranks import at_ranks

_TINY = 1e-8


@merge_method(
    paper="Arcee AI, Arcee Fusion in mergekit, https://arcee.ai",
    base="needed",
    models=(2, 2),
)
def arcee_fusion(request: Request) -> torch.Tensor:
    """Return the other model where it matters, else the base model; computed in the inputs' dtype.

    An element matters if its change, times the divergence of the softmax of its row, is above the median of the
    tensor by one and a half times the distance of the quartiles. The quartiles are those of all elements, where
    mergekit samples a million.
    """
    base, other = request.base_tensor, request.others[0].tensor
    before, after = (t.reshape(-1, t.shape[-1] if t.ndim else 1) for t in (base, other))
    scores, result = torch.empty(before.shape, dtype=base.dtype), torch.empty(before.shape, dtype=base.dtype)
    for out, old, new in _rows(scores, before, after):
        torch.mul((new - old).abs_(), _divergence(new, old), out=out)
    limit = _limit(scores)
    for out, old, new, score in _rows(result, before, after, scores):
        # Not simply the other's element: the sum is rounded as mergekit rounds it.
        torch.add(old, (new - old).mul_(score >= limit), out=out)
    return result.reshape(base.shape)


def _rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    some = max(1, BLOCK // tensors[0].shape[-1])
    yield from zip(*(torch.split(tensor, some) for tensor in tensors), strict=True)


def _divergence(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of each row, (rows, 1)."""
    p, q = new.softmax(dim=-1).add_(_TINY), old.softmax(dim=-1).add_(_TINY)
    return (p / q).log_().mul_(p).sum(dim=-1, keepdim=True)


def _limit(scores: torch.Tensor) -> torch.Tensor:
    last = scores.numel() - 1
    quartiles = at_ranks(scores, [last // 4, last // 2, 3 * last // 4])
    lower, median, upper = torch.tensor(quartiles, dtype=scores.dtype).unbind()
    return median + 1.5 * (upper - lower)
