"""TIES: trim task vectors, elect a sign for each element, merge those that agree with it."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.task_vectors import merged, model_parameters, parameters
from tailor_dcp.methods.thinning import keep_largest


@merge_method(
    paper="Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708",
    parameters=parameters(normalize=True),
    model_parameters=model_parameters(),
    base="needed",
)
def ties(request: Request) -> torch.Tensor:
    """Return the base model plus the mean of the largest elements of task vectors that agree in sign."""
    return merged(request, keep_largest, vote=True)
