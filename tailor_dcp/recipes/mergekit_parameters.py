"""Parameters as mergekit's plans write them: numbers, gradients over the layers, and choices by a tensor's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tailor_dcp.methods.base import REQUIRED, Parameter
from tailor_dcp.recipes.errors import RecipeError

Scalar = bool | int | float | str
_SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True)
class Gradient:
    """Values over the layers of a slice: numbers are interpolated, others picked by their place."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose names have ``filter`` in them; for all where that is None or ``*``."""

    value: Scalar | Gradient
    filter: str | None = None

    def holds(self, tensor: str) -> bool:
        """Tell whether a tensor is meant."""
        return self.filter is None or self.filter == "*" or (bool(tensor) and self.filter in tensor)


Setting = Scalar | Gradient | tuple[Condition, ...]
"""What a plan says of one parameter."""
Settings = Mapping[str, Setting]
"""What a plan says of parameters in one place."""


def setting(value: object) -> Setting:
    """Return what a plan says of a parameter, from YAML's plain data.

    Raises:
        ValueError: it is in none of the forms.
    """
    if isinstance(value, dict):
        return (_condition(value),)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return tuple(_condition(item) for item in value)
    return _value(value)


def _value(value: object) -> Scalar | Gradient:
    return Gradient(tuple(_scalar(item) for item in value)) if isinstance(value, list) else _scalar(value)


def _condition(value: object) -> Condition:
    if not isinstance(value, dict):  # pydantic takes no TypeError for a value that makes no sense
        raise ValueError(f"{value!r} stands among entries with a value and a filter, and has neither")  # noqa: TRY004
    unknown = [key for key in value if key not in ("value", "filter")]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is neither value nor filter")
    chosen = value.get("filter")
    if chosen is not None and not isinstance(chosen, str):
        raise ValueError(f"the filter {chosen!r} is no part of a tensor's name")
    if "value" not in value:
        raise ValueError("an entry with a filter has no value")
    return Condition(_value(value["value"]), chosen)


def _scalar(value: object) -> Scalar:
    if isinstance(value, str):
        return _read(value)
    if isinstance(value, bool | int | float):
        return value
    raise ValueError(f"{value!r} is neither a number nor a switch")


def _read(text: str) -> Scalar:
    """Return what a string means: YAML takes ``1e-3`` for one."""
    word = text.strip()
    if word.lower() in _SWITCHES:
        return _SWITCHES[word.lower()]
    try:
        return float(word)
    except ValueError:
        return text


def position(index: int, count: int) -> float:
    """Return where a layer is in its slice: 0 for the first, 1 for the last, and 1 for the only one."""
    return index / (count - 1) if count > 1 else 1.0


def value_of(parameter: Parameter, scopes: Iterable[Mapping[str, Any]], tensor: str, t: float, what: str) -> Any:
    """Return a parameter's value for a tensor.

    Args:
        parameter: the parameter.
        scopes: what the plan says in each place, the more special first. The first place that has a value for the
            tensor counts: a list of filters of which none is met says nothing.
        tensor: the tensor's name: the model's own for what is taken for each model, else the result's.
        t: the layer's position in its slice, 0 outside of the layers.
        what: what it is for, in messages.

    Raises:
        RecipeError: it must be given and is not, or is not of the parameter's type.
    """
    for scope in scopes:
        if parameter.name in scope:
            found = _evaluated(parameter, scope[parameter.name], tensor, t)
            if found is not None:
                return found
    if parameter.default is REQUIRED:
        raise RecipeError(f"{what} has no {parameter.name!r}; give it there, or for all under parameters.")
    return parameter.default


def _evaluated(parameter: Parameter, said: Setting, tensor: str, t: float) -> Any:
    if isinstance(said, tuple):
        met = next((condition for condition in said if condition.holds(tensor)), None)
        return None if met is None else _evaluated(parameter, met.value, tensor, t)
    if isinstance(said, Gradient):
        return _between(parameter, said.values, t) if said.values else None
    return parameter.read(said)


def _between(parameter: Parameter, values: tuple[Scalar, ...], t: float) -> Any:
    """Return the value of a gradient at a position."""
    place = t * (len(values) - 1)
    lower = int(place)
    if parameter.type is bool or any(isinstance(value, bool | str) for value in values):
        return parameter.read(values[lower])
    upper = min(lower + 1, len(values) - 1)
    part = place - lower
    return parameter.read((1 - part) * float(values[lower]) + part * float(values[upper]))
