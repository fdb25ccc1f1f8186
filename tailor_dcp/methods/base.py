"""What a merge method is: a function on the tensors of several models, and what it can be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

REQUIRED = object()
"""The default of a parameter that has none."""


@dataclass(frozen=True)
class Parameter:
    """A number or switch that a method takes.

    Attributes:
        name: as recipes write it.
        default: its value where a recipe gives none; ``REQUIRED`` if it must.
    """

    name: str
    default: Any = REQUIRED


class Input(NamedTuple):
    """One model's tensor.

    Attributes:
        tensor: on the CPU, in the recipe's dtype or that of the model's files. It must not be changed.
        parameters: the method's ``model_parameters``, each with its value for this model and tensor.
    """

    tensor: torch.Tensor
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """The tensors of one name from several models.

    Attributes:
        name: the tensor's name in the result.
        inputs: one for each model, all of one shape, in the recipe's order; the base model is one of them.
        base: which of the inputs is the base model's, None without one.
        parameters: the method's ``parameters``, each with its value for this tensor.
        seed: what stochastic methods seed their generator with: other for each tensor, the same in each run.
    """

    name: str
    inputs: tuple[Input, ...]
    base: int | None
    parameters: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: as recipes write it.
        merge: the function: returns a tensor of the inputs' shape, of any floating-point dtype.
        paper: where it comes from.
        parameters: what it takes once for a tensor.
        model_parameters: what it takes for each model.
        base: whether a recipe must, may or must not name a ``base_model``.
        models: the least and the largest number of inputs, the base model's among them; None for no limit.
        stochastic: whether it draws random numbers.
    """

    name: str
    merge: Callable[[Request], torch.Tensor]
    paper: str
    parameters: tuple[Parameter, ...] = ()
    model_parameters: tuple[Parameter, ...] = ()
    base: Literal["needed", "allowed", "refused"] = "allowed"
    models: tuple[int, int | None] = (1, None)
    stochastic: bool = False
