"""NuSLERP: slerp with a weight for each model, of whole tensors, rows or columns, and of task vectors too."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.slerp import arc_weights
from tailor_dcp.methods.spans import combined

_TINY = 1e-7
# Below this squared sine the ends are parallel as far as fp32 tensors can tell.
_PARALLEL = 1e-6


@merge_method(
    paper="Goddard et al., mergekit's own variant of slerp, https://github.com/arcee-ai/mergekit",
    parameters=[Parameter("nuslerp_row_wise", False, bool), Parameter("nuslerp_flatten", True, bool)],
    model_parameters=[Parameter("weight", of_base=False)],
    models=(2, 3),
    others=(2, 2),
)
def nuslerp(request: Request) -> torch.Tensor:
    """Return the point between two models, as far along the arc as the second one's share of the weights.

    With a base model it is the differences to it that are interpolated. ``nuslerp_flatten`` takes each tensor as one
    vector; without it each vector along the last dimension is one, or with ``nuslerp_row_wise`` along the first.
    Parallel vectors are interpolated linearly; weights that add up to nothing mean the middle.
    """
    first, second = request.others
    total = first.parameters["weight"] + second.parameters["weight"]
    t = 0.5 if abs(total) < 1e-6 else second.parameters["weight"] / total

    def weigh(dots: torch.Tensor) -> torch.Tensor:
        length = dots.diagonal(dim1=1, dim2=2).sqrt().clamp(min=_TINY)
        cosine = (dots[:, 0, 1] / length.prod(dim=1)).clamp(-1, 1)
        return arc_weights(t, cosine, 1 - cosine.square() <= _PARALLEL)

    along = None if request.parameters["nuslerp_flatten"] else 0 if request.parameters["nuslerp_row_wise"] else -1
    origin = None if request.base is None else request.base_tensor
    return combined([first.tensor, second.tensor], weigh, origin=origin, along=along)
