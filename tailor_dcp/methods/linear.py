"""Linear: the weighted mean, or with ``normalize: false`` the weighted sum."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.blocks import combination
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.recipes.errors import RecipeError


@merge_method(
    paper="Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482",
    parameters=[Parameter("normalize", True, bool)],
    model_parameters=[Parameter("weight")],
)
def linear(request: Request) -> torch.Tensor:
    """Return the weighted sum, divided by the sum of the weights if ``normalize``; computed in fp32.

    Raises:
        RecipeError: the weights of a mean add up to nothing.
    """
    weights = [given.parameters["weight"] for given in request.inputs]
    if request.parameters["normalize"]:
        total = sum(weights)
        if total == 0:
            raise RecipeError(
                f"The weights of {request.name} add up to 0, so they make no mean: change them or say normalize: false."
            )
        weights = [weight / total for weight in weights]
    return combination(request.tensors, weights)
