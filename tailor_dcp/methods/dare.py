"""DARE: drop elements of task vectors at random, and rescale what is left."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.task_vectors import merged, model_parameters, parameters
from tailor_dcp.methods.thinning import keep_random

_PAPER = "Yu et al., Language models are super Mario, https://arxiv.org/abs/2311.03099"


@merge_method(
    paper=_PAPER,
    parameters=parameters(rescale=True),
    model_parameters=model_parameters(),
    base="needed",
    stochastic=True,
)
def dare_linear(request: Request) -> torch.Tensor:
    """Return the base model plus the weighted sum of task vectors, each thinned out at random."""
    return merged(request, keep_random)


@merge_method(
    paper=_PAPER,
    parameters=parameters(rescale=True),
    model_parameters=model_parameters(),
    base="needed",
    stochastic=True,
)
def dare_ties(request: Request) -> torch.Tensor:
    """Return the base model plus the sum of the task vectors, thinned out at random, that agree in sign as in TIES."""
    return merged(request, keep_random, vote=True)
