"""Passthrough: one model's tensor, as it is or scaled."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.definition import merge_method


@merge_method(
    paper="Kim et al., SOLAR 10.7B: depth up-scaling, https://arxiv.org/abs/2312.15166",
    model_parameters=[Parameter("scale", None)],
    models=(1, 1),
)
def passthrough(request: Request) -> torch.Tensor:
    """Return the tensor, times ``scale`` where that is given."""
    tensor, parameters = request.inputs[0]
    return tensor if parameters["scale"] is None else tensor * parameters["scale"]
