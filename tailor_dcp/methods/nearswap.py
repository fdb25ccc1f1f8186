"""NearSwap: where two models are near each other, the base model gives way to the other one."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.blocks import flat_blocks, precise
from tailor_dcp.methods.definition import merge_method

_TINY = 1e-6


@merge_method(
    paper="alchemonaut, QuartetAnemoi, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    parameters=[Parameter("t")],
    base="needed",
    models=(2, 2),
)
def nearswap(request: Request) -> torch.Tensor:
    """Return the base model, moved by ``t`` towards the other one, and all the way where they are no further apart."""
    base, other = request.base_tensor, request.others[0].tensor
    result = torch.empty(base.shape, dtype=base.dtype)
    exact = precise(base.dtype)
    for out, near, far in flat_blocks(result, base, other):
        first, second = near.to(exact), far.to(exact)
        weight = (first - second).abs_().clamp_(min=_TINY).reciprocal_().mul_(request.parameters["t"]).clamp_(0, 1)
        out.copy_(torch.lerp(first, second, weight))
    return result
