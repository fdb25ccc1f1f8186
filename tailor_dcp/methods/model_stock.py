"""Model Stock: from the base model towards the mean, as far as the angles between the models tell."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.spans import combined

_TINY = 1e-6


@merge_method(
    paper="Jang et al., Model Stock, https://arxiv.org/abs/2403.19522",
    parameters=[Parameter("filter_wise", False, bool)],
    base="needed",
    models=(3, None),
)
def model_stock(request: Request) -> torch.Tensor:
    """Return the point between the base model and the mean of the others that is nearest to where they scatter around.

    With ``filter_wise`` each vector along the last dimension is looked at by itself. Where the models pull in
    directions that cancel out, it is the base model's.
    """
    count = len(request.others)
    first, second = torch.triu_indices(count, count, offset=1)

    def weigh(dots: torch.Tensor) -> torch.Tensor:
        length = dots.diagonal(dim1=1, dim2=2).sqrt()
        products = (length[:, first] * length[:, second]).clamp(min=_TINY)
        cosine = (dots[:, first, second] / products).clamp(-1, 1).mean(dim=1, keepdim=True)
        below = 1 + (count - 1) * cosine
        nowhere = below.abs() < _TINY
        t = torch.where(nowhere, 0, count * cosine / torch.where(nowhere, 1, below))
        return (t / count).expand(-1, count)

    along = -1 if request.parameters["filter_wise"] else None
    return combined([given.tensor for given in request.others], weigh, origin=request.base_tensor, along=along)
