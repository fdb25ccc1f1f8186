"""Ways to choose the few elements of a task vector that are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tailor_dcp.methods.blocks import BLOCK, flat_blocks, precise
from tailor_dcp.methods.ranks import smallest
from tailor_dcp.recipes.errors import RecipeError

Thinning = Callable[[torch.Tensor, Mapping[str, Any], torch.Generator], torch.Tensor | None]
"""Marks what is kept, given the magnitudes of a task vector and the model's parameters; None for everything."""


def keep_largest(sizes: torch.Tensor, parameters: Mapping[str, Any], _: torch.Generator) -> torch.Tensor | None:
    """Keep the share ``density`` of the elements, the largest: TIES. It is at least one unless the density is 0."""
    density, count = parameters["density"], sizes.numel()
    if density >= 1:
        return None
    kept = max(1, int(density * count)) if density > 0 else 0
    return smallest(sizes, count - kept, last=True).logical_not_()


def keep_middle(sizes: torch.Tensor, parameters: Mapping[str, Any], _: torch.Generator) -> torch.Tensor | None:
    """Drop the share ``gamma``, the largest, and of the smallest what is beyond ``density``: breadcrumbs."""
    density, count = parameters["density"], sizes.numel()
    if density >= 1:
        return None
    kept = int(density * count)
    # Fewer large ones are dropped where that would leave too little.
    below = max(0, count - kept - int(parameters["gamma"] * count))
    return smallest(sizes, below + kept).logical_xor_(smallest(sizes, below))


def keep_random(sizes: torch.Tensor, parameters: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor | None:
    """Keep each element with the probability ``density``: DARE."""
    if parameters["density"] >= 1:
        return None
    kept = torch.empty(sizes.shape, dtype=torch.bool)
    for (part,) in flat_blocks(kept):
        torch.lt(torch.rand(part.shape, generator=generator), parameters["density"], out=part)
    return kept


def keep_random_by_rank(
    sizes: torch.Tensor, parameters: Mapping[str, Any], generator: torch.Generator
) -> torch.Tensor | None:
    """Keep each element with a probability that grows with its rank in its row: DELLA.

    The probability goes from ``density - epsilon`` for the smallest element to ``density + epsilon`` for the largest.
    A row lies along the second dimension; a tensor of one dimension is one row.

    Raises:
        RecipeError: these probabilities are not between 0 and 1.
    """
    density, epsilon = parameters["density"], parameters["epsilon"]
    if density >= 1:
        return None
    kept = torch.zeros(sizes.shape, dtype=torch.bool)
    if density <= 0:
        return kept
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise RecipeError(
            f"The density {density} with the epsilon {epsilon} gives probabilities that are not between 0 and 1: "
            "take a smaller epsilon."
        )
    rows, marks = (tensor.reshape(1, -1) if tensor.ndim < 2 else tensor for tensor in (sizes, kept))
    length = rows.shape[1]
    chances = density + (torch.linspace(-epsilon, epsilon, length) if length > 1 else torch.zeros(1))
    chances = chances.view(-1, *[1] * (rows.ndim - 2))
    some = max(1, BLOCK // rows[0].numel())
    for part, out in zip(torch.split(rows, some), torch.split(marks, some), strict=True):
        order = part.to(precise(part.dtype)).argsort(dim=1)
        chance = torch.empty(part.shape).scatter_(1, order, chances.expand(part.shape))
        torch.lt(torch.rand(part.shape, generator=generator), chance, out=out)
    return kept
