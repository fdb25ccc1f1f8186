"""Karcher mean: the point on the sphere with the least squared distances to all models."""

from __future__ import annotations

import torch

from tailor_dcp.methods.base import Parameter, Request
from tailor_dcp.methods.definition import merge_method
from tailor_dcp.methods.spans import combined

# Nearly opposite to the mean, no direction is the shortest way to it.
_OPPOSITE = 1e-6


@merge_method(
    paper="Karcher, Riemannian center of mass, https://doi.org/10.1002/cpa.3160300502",
    parameters=[Parameter("max_iter", 10, int), Parameter("tol", 1e-5)],
)
def karcher(request: Request) -> torch.Tensor:
    """Return the Karcher mean of the directions of all models, at their mean length.

    It is iterated ``max_iter`` times, or until a step is shorter than ``tol``. Tensors shorter than ``tol`` have no
    direction and count only for the length. A single model is returned as it is.
    """
    if len(request.inputs) == 1:
        return request.tensors[0]
    steps, tol = request.parameters["max_iter"], request.parameters["tol"]

    def weigh(dots: torch.Tensor) -> torch.Tensor:
        (dots,) = dots
        lengths = dots.diagonal().sqrt()
        pointing = lengths > tol
        weights = torch.zeros_like(lengths)
        if pointing.any():
            inverse = 1 / lengths[pointing]
            directions = dots[pointing][:, pointing] * torch.outer(inverse, inverse)
            weights[pointing] = _mean(directions, steps, tol) * inverse * lengths.mean()
        return weights[None]

    return combined(request.tensors, weigh)


def _mean(directions: torch.Tensor, steps: int, tol: float) -> torch.Tensor:
    """Return the Karcher mean of unit vectors as weights of theirs, given their dot products."""

    def length(weights: torch.Tensor) -> torch.Tensor:
        return (weights @ directions @ weights).clamp(min=0).sqrt()

    count = len(directions)
    mean = torch.full((count,), 1 / count, dtype=torch.float64)
    mean = torch.eye(count, dtype=torch.float64)[0] if length(mean) < tol else mean / length(mean)
    for _ in range(steps):
        cosines = (directions @ mean).clamp(-1, 1)
        angles = cosines.acos()
        apart = (angles >= tol) & (angles.sin() > _OPPOSITE)
        pulls = torch.where(apart, angles / angles.sin().clamp(min=_OPPOSITE), 0) / count
        tangent = pulls - (pulls * cosines).sum() * mean
        step = length(tangent)
        if step < tol:
            break
        mean = step.cos() * mean + step.sin() * (tangent / step)
        if length(mean) > tol:
            mean = mean / length(mean)
    return mean
