"""Making a merge method of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import torch

from tailor_dcp.methods.base import REQUIRED, Input, Method, Parameter, Request
from tailor_dcp.recipes.errors import RecipeError

Function = Callable[[Request], torch.Tensor]


def merge_method(
    *,
    paper: str,
    name: str | None = None,
    parameters: Sequence[Parameter] = (),
    model_parameters: Sequence[Parameter] = (),
    base: Literal["needed", "allowed", "refused"] = "allowed",
    models: tuple[int, int | None] = (1, None),
    others: tuple[int, int | None] = (0, None),
    stochastic: bool = False,
) -> Callable[[Function], Method]:
    """Make a `Method` of a function on tensors.

    The function sees only requests that it can work on: as many models as it takes, each parameter with a value,
    tensors of one shape and of one floating-point dtype, the one that all inputs' dtypes promote to (those of one
    byte count as fp32). It runs without gradients. Tensors that are not of floating point never get to it: where
    all models have the same one, that is the result.

    Args:
        paper: where the method comes from.
        name: as recipes write it; None for the function's own name.
        parameters: what it takes once for a tensor.
        model_parameters: what it takes for each model.
        base: whether a recipe must, may or must not name a ``base_model``.
        models: the least and the largest number of inputs, the base model's among them; None for no limit.
        others: the least and the largest number of inputs besides the base model's.
        stochastic: whether it draws random numbers.

    Returns:
        A decorator. The method's ``merge`` raises RecipeError, naming the tensor, for a request that does not fit.
    """

    def decorate(function: Function) -> Method:
        method = Method(
            name=name or function.__name__,
            merge=lambda request: _merged(method, function, request),
            paper=paper,
            parameters=tuple(parameters),
            model_parameters=tuple(model_parameters),
            base=base,
            models=models,
            stochastic=stochastic,
            others=others,
        )
        return method

    return decorate


def _merged(method: Method, function: Function, request: Request) -> torch.Tensor:
    method.check(len(request.inputs), request.base is not None)
    shape = request.inputs[0].tensor.shape
    if any(given.tensor.shape != shape for given in request.inputs):
        shapes = " and ".join(dict.fromkeys(str(tuple(tensor.shape)) for tensor in request.tensors))
        raise RecipeError(f"{request.name} has the shapes {shapes} in the models: merge models of one shape.")
    if not all(tensor.is_floating_point() for tensor in request.tensors):
        return _agreed(request)
    ready = _ready(method, request)
    if not shape.numel():
        return ready.inputs[0].tensor
    with torch.no_grad():
        result = function(ready)
    if result.shape != shape or not result.is_floating_point():
        raise RecipeError(
            f"The merge method {method.name!r} makes a tensor of shape {tuple(result.shape)} and {result.dtype} of "
            f"{request.name}, which has the shape {tuple(shape)}: correct the method."
        )
    return result


def _agreed(request: Request) -> torch.Tensor:
    """Return what all models have: counters, masks and the like have no mean."""
    first, *rest = request.tensors
    if any(tensor.dtype != first.dtype or not torch.equal(tensor, first) for tensor in rest):
        raise RecipeError(
            f"{request.name} is not of floating point in all models and differs between them, so it cannot be merged: "
            "make it equal in all of them, or take its layer from one model."
        )
    return first


def _ready(method: Method, request: Request) -> Request:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in request.tensors))
    dtype = dtype if dtype.itemsize > 1 else torch.float32
    inputs = tuple(
        Input(
            given.tensor.to(dtype),
            _complete(
                method,
                [p for p in method.model_parameters if p.of_base or index != request.base],
                given.parameters,
                f"{request.name} of model {index + 1}",
            ),
        )
        for index, given in enumerate(request.inputs)
    )
    parameters = _complete(method, method.parameters, request.parameters, request.name)
    return replace(request, inputs=inputs, parameters=parameters)


def _complete(
    method: Method, parameters: Sequence[Parameter], given: Mapping[str, Any], what: str
) -> Mapping[str, Any]:
    values = {parameter.name: given.get(parameter.name, parameter.default) for parameter in parameters}
    missing = next((name for name, value in values.items() if value is REQUIRED), None)
    if missing is not None:
        raise RecipeError(f"The merge method {method.name!r} needs the parameter {missing!r} for {what}.")
    return {parameter.name: parameter.read(values[parameter.name]) for parameter in parameters}
