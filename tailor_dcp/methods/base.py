"""What a merge method is: a function on the tensors of several models, and what it can be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from tailor_dcp.recipes.errors import RecipeError

REQUIRED = object()
"""The default of a parameter that has none."""

_WORDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Parameter:
    """A number or switch that a method takes.

    Attributes:
        name: as recipes write it.
        default: its value where a recipe gives none; ``REQUIRED`` if it must.
        type: ``float``, ``int`` or ``bool``.
        of_base: for what is taken for each model: whether the base model takes it too.
    """

    name: str
    default: Any = REQUIRED
    type: type[float] = float
    of_base: bool = True

    def read(self, value: object) -> Any:
        """Return a recipe's value in the parameter's type.

        Numbers stand for switches and whole numbers too, as gradients give numbers only.

        Raises:
            RecipeError: it is not of that type, or not finite.
        """
        if value is None and self.default is None:
            return None
        if not self._fits(value):
            raise RecipeError(f"The parameter {self.name!r} is {_WORDS[self.type]}, not {value!r}.")
        return self.type(value)  # type: ignore[arg-type]

    def _fits(self, value: object) -> bool:
        if isinstance(value, bool):
            return self.type is bool
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return self.type is float or (value in (0, 1) if self.type is bool else value == int(value))


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

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors of all models."""
        return [given.tensor for given in self.inputs]

    @property
    def base_tensor(self) -> torch.Tensor:
        """The base model's tensor.

        Raises:
            ValueError: there is no base model.
        """
        if self.base is None:
            raise ValueError("There is no base model.")
        return self.inputs[self.base].tensor

    @property
    def others(self) -> list[Input]:
        """What comes from the models that are not the base."""
        return [given for index, given in enumerate(self.inputs) if index != self.base]


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
        others: the least and the largest number of inputs besides the base model's.
    """

    name: str
    merge: Callable[[Request], torch.Tensor]
    paper: str
    parameters: tuple[Parameter, ...] = ()
    model_parameters: tuple[Parameter, ...] = ()
    base: Literal["needed", "allowed", "refused"] = "allowed"
    models: tuple[int, int | None] = (1, None)
    stochastic: bool = False
    others: tuple[int, int | None] = (0, None)

    def check(self, models: int, base: bool) -> None:
        """See that a recipe gives it the models that it takes.

        Args:
            models: how many there are, the base model among them.
            base: whether one of them is the base model.

        Raises:
            RecipeError: there are too few or too many, or a base model is missing or in the way.
        """
        if self.base == "needed" and not base:
            raise RecipeError(f"The merge method {self.name!r} needs a base model: name it under base_model.")
        if self.base == "refused" and base:
            raise RecipeError(f"The merge method {self.name!r} takes no base model: leave base_model out.")
        self._count("", models, self.models)
        self._count(" besides the base model", models - base, self.others)

    def _count(self, which: str, count: int, limits: tuple[int, int | None]) -> None:
        least, most = limits
        if count >= least and (most is None or count <= most):
            return
        wanted = f"exactly {least}" if least == most else f"at least {least}" if count < least else f"at most {most}"
        noun = "model" if wanted.endswith(" 1") else "models"
        raise RecipeError(f"The merge method {self.name!r} takes {wanted} {noun}{which}, not {count}.")
