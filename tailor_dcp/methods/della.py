"""DELLA: drop elements of task vectors at random, small ones more often, and rescale what is left."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.task_vectors import merged, model_parameters, parameters
from tailor_dcp.methods.thinning import keep_random_by_rank

_PAPER = "Deep et al., DELLA-Merging, https://arxiv.org/abs/2406.11617"
_EPSILON = Parameter("epsilon", 0.15, of_base=False)


@merge_method(
    paper=_PAPER,
    parameters=parameters(normalize=True, rescale=True),
    model_parameters=model_parameters(_EPSILON),
    base="needed",
    stochastic=True,
)
def della(request: Request) -> torch.Tensor:
    """Return the base model plus the mean of the task vectors, thinned out by rank, that agree in sign as in TIES."""
    return merged(request, keep_random_by_rank, vote=True)


@merge_method(
    paper=_PAPER,
    parameters=parameters(rescale=True),
    model_parameters=model_parameters(_EPSILON),
    base="needed",
    stochastic=True,
)
def della_linear(request: Request) -> torch.Tensor:
    """Return the base model plus the weighted sum of task vectors, each thinned out by rank."""
    return merged(request, keep_random_by_rank)
