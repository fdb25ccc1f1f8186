"""Slerp: from one model to another along the arc between them."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.spans import combined

_ALIGNED = 0.9995
_TINY = 1e-8


@merge_method(
    paper="Shoemake, Animating rotation with quaternion curves, https://dl.acm.org/doi/10.1145/325334.325242",
    parameters=[Parameter("t")],
    base="needed",
    models=(2, 2),
)
def slerp(request: Request) -> torch.Tensor:
    """Return the point at ``t`` between the base model (0) and the other one (1); computed in fp32.

    Tensors that point in nearly the same or opposite directions have no arc between them: they are interpolated
    linearly.
    """
    t = request.parameters["t"]

    def weigh(dots: torch.Tensor) -> torch.Tensor:
        length = dots.diagonal(dim1=1, dim2=2).sqrt()
        length = torch.where(length > _TINY, length, 1)
        cosine = (dots[:, 0, 1] / length.prod(dim=1)).clamp(-1, 1)
        return arc_weights(t, cosine, cosine.abs() > _ALIGNED)

    return combined([request.base_tensor, request.others[0].tensor], weigh)


def arc_weights(t: float, cosine: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """Return the weights (rows, 2) of two ends of arcs, given the angles' cosines and which arcs are none."""
    angle = torch.where(linear, 0, cosine).acos()
    sine = angle.sin()
    first = torch.where(linear, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(linear, t, (t * angle).sin() / sine)
    return torch.stack([first, second], dim=1)
