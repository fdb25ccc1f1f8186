"""Model Breadcrumbs: drop both the outliers and the small change of task vectors."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.task_vectors import merged, model_parameters, parameters
from tailor_dcp.methods.thinning import keep_middle

_PAPER = "Davari and Belilovsky, Model Breadcrumbs, https://arxiv.org/abs/2312.06795"
_GAMMA = Parameter("gamma", 0.01, of_base=False)


@merge_method(paper=_PAPER, parameters=parameters(), model_parameters=model_parameters(_GAMMA), base="needed")
def breadcrumbs(request: Request) -> torch.Tensor:
    """Return the base model plus the weighted sum of task vectors without their largest and smallest elements."""
    return merged(request, keep_middle)


@merge_method(paper=_PAPER, parameters=parameters(), model_parameters=model_parameters(_GAMMA), base="needed")
def breadcrumbs_ties(request: Request) -> torch.Tensor:
    """Return the base model plus the sum of such task vectors that agree in sign as in TIES."""
    return merged(request, keep_middle, vote=True)
