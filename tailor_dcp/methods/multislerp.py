"""Multi-SLERP: slerp for any number of models."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.spans import combined
from tailor_dcp.recipes.errors import RecipeError

# Directions whose mean is shorter than this cancel out: what is left of it is rounding.
_CANCELLED = 1e-7


@merge_method(
    paper="Goddard, Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    parameters=[Parameter("normalize_weights", True, bool), Parameter("eps", 1e-8)],
    model_parameters=[Parameter("weight", of_base=False)],
    others=(1, None),
)
def multislerp(request: Request) -> torch.Tensor:
    """Return the weighted mean on the sphere, found in the tangent space at the mean direction, at the mean length.

    With a base model it is the differences to it that are averaged. A single model is returned as it is; two that
    cancel out are averaged linearly, and so are zeros.

    Raises:
        RecipeError: the weights of a mean add up to nothing, or the directions of three or more models cancel out.
    """
    others = request.others
    if len(others) == 1:
        return others[0].tensor
    eps = request.parameters["eps"]
    weights = torch.tensor([given.parameters["weight"] for given in others], dtype=torch.float64)
    if request.parameters["normalize_weights"]:
        if weights.sum() == 0:
            raise RecipeError(
                f"The weights of {request.name} add up to 0, so they make no mean: "
                "change them or say normalize_weights: false."
            )
        weights = weights / weights.sum()

    def weigh(dots: torch.Tensor) -> torch.Tensor:
        dots = dots[0]
        lengths = dots.diagonal().sqrt()
        inverse = 1 / (lengths + eps)
        directions = dots * torch.outer(inverse, inverse)
        mean_length = (weights @ directions @ weights).clamp(min=0).sqrt()
        if mean_length < max(eps, _CANCELLED):
            # Two of them have a straight line between them; what no model changed stays.
            if len(others) == 2 or not lengths.any():
                return weights[None]
            raise RecipeError(
                f"The directions of {request.name} in the models cancel out and have no mean: change their weights."
            )
        mean = weights / mean_length
        tangent = weights - (weights * (directions @ mean)).sum() * mean
        angle = (tangent @ directions @ tangent).clamp(min=0).sqrt() + eps
        point: torch.Tensor = mean * angle.cos() + tangent * (angle.sin() / angle)
        point *= inverse * (lengths @ weights)
        return point.unsqueeze(0)

    origin = None if request.base is None else request.base_tensor
    return combined([given.tensor for given in others], weigh, origin=origin)
