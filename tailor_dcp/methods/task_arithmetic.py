"""Task arithmetic: the base model plus a weighted sum of task vectors."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.task_vectors import merged, model_parameters, parameters


@merge_method(
    paper="Ilharco et al., Editing models with task arithmetic, https://arxiv.org/abs/2212.04089",
    parameters=parameters(),
    model_parameters=model_parameters(),
    base="needed",
)
def task_arithmetic(request: Request) -> torch.Tensor:
    """Return the base model plus the weighted sum of task vectors; ``density`` and ``rescale`` change nothing."""
    return merged(request)
