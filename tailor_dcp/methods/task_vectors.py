"""What task arithmetic and its descendants share: a weighted sum of task vectors, thinned out, with or without a vote.

A task vector is what a model differs by from the base model.
"""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Input, Parameter, Request
from tailor_dcp.methods.blocks import flat_blocks, precise
from tailor_dcp.methods.thinning import Thinning

_TINY = 1e-7


def parameters(*, normalize: bool = False, rescale: bool = False) -> list[Parameter]:
    """Return what such a method takes for a tensor, given its defaults."""
    return [
        Parameter("normalize", normalize, bool),
        Parameter("rescale", rescale, bool),
        Parameter("lambda", 1.0),
        # It says only how much memory mergekit takes.
        Parameter("int8_mask", False, bool),
    ]


def model_parameters(*more: Parameter) -> list[Parameter]:
    """Return what such a method takes for each model that is not the base."""
    return [Parameter("weight", of_base=False), Parameter("density", 1.0, of_base=False), *more]


def merged(request: Request, thin: Thinning | None = None, *, vote: bool = False) -> torch.Tensor:
    """Return the base model's tensor plus a sum of task vectors.

    It is computed in the inputs' dtype, so that signs are what they are in mergekit. ``normalize`` divides the sum by
    the sum of the weights that went into it, ``rescale`` makes up for what thinning took away, ``lambda`` scales it.

    Args:
        request: as these methods have it.
        thin: marks the elements of a task vector that are kept; None to keep all.
        vote: whether each element takes only the task vectors that have the sign of their sum there: TIES.
    """
    base, others = request.base_tensor, request.others
    if not others:
        return base
    kept, factors = _thinned(request, thin)
    weights = _column([given.parameters["weight"] for given in others], base.dtype)
    result = torch.empty(base.shape, dtype=base.dtype)
    for out, origin, *parts in flat_blocks(result, base, *(given.tensor for given in others), *kept):
        deltas = torch.stack(parts[: len(others)]).sub_(origin)
        if kept:
            deltas.masked_fill_(torch.stack(parts[len(others) :]).logical_not_(), 0).mul_(factors)
        deltas.mul_(weights)
        agree = agreeing(deltas) if vote else None
        total = deltas.sum(dim=0) if agree is None else deltas.mul_(agree).sum(dim=0)
        if request.parameters["normalize"]:
            total.div_(_divisor(weights, agree))
        torch.add(origin, total.mul_(request.parameters["lambda"]), out=out)
    return result


def agreeing(deltas: torch.Tensor) -> torch.Tensor:
    """Mark where task vectors, (models, elements), have the sign of their sum; zeros never have it."""
    return deltas.sign() == torch.where(deltas.sum(dim=0) >= 0, 1, -1)


def _divisor(weights: torch.Tensor, agree: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of the weights that went into each sum; 1 where they make no mean as they cancel out."""
    if agree is None:
        total = weights.sum(dim=0)
        return total.masked_fill_(total.abs() < 1e-8, 1)
    total = (weights * agree).sum(dim=0)
    return total.masked_fill_(total == 0, 1)


def _thinned(request: Request, thin: Thinning | None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what is kept of each task vector, nothing if all of them are whole, and the factors that go with it."""
    base = request.base_tensor
    if thin is None:
        return [], _column([], precise(base.dtype))
    generator = torch.Generator().manual_seed(request.seed)
    done = [_thin(thin, base, given, request.parameters["rescale"], generator) for given in request.others]
    return [kept for kept, _ in done], _column([factor for _, factor in done], precise(base.dtype))


def _thin(
    thin: Thinning, base: torch.Tensor, given: Input, rescale: bool, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    # Marks take a byte an element, where thinned out task vectors would take as much as the models.
    sizes = (given.tensor - base).abs_().contiguous()
    marks = thin(sizes, given.parameters, generator)
    if marks is None:
        return torch.ones((), dtype=torch.bool).expand(base.shape), 1.0
    if not rescale:
        return marks, 1.0
    before = sum(float(part.sum(dtype=torch.float64)) for (part,) in flat_blocks(sizes))
    after = sum(float(part[mark].sum(dtype=torch.float64)) for part, mark in flat_blocks(sizes, marks))
    return marks, before / after if before >= _TINY and after >= _TINY else 1.0


def _column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]
