"""Resolving a plan: what each tensor of the result is made of, found from names, shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.methods.base import Method
from tailor_dcp.methods.registry import method_named
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_anatomy import Anatomy, anatomy
from tailor_dcp.recipes.mergekit_checks import check_built, check_parameters, check_sources, matched
from tailor_dcp.recipes.mergekit_data import Plan, PlanSlice, PlanSource
from tailor_dcp.recipes.mergekit_parameters import position, value_of

PASSTHROUGH = "passthrough"


@dataclass(frozen=True)
class Taken:
    """A model's tensor that goes into one of the result's.

    Attributes:
        model: the model, as the plan writes it.
        name: the tensor's name there.
        parameters: what the method is told for this model and tensor.
    """

    model: str
    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """A tensor of the result.

    Attributes:
        name: its name.
        inputs: what it is made of.
        base: which of them is the base model's.
        parameters: what the method is told for this tensor.
        size: its shape, and that of all inputs.
        computed: the dtype that the inputs are given, and the method's result before ``out_dtype``.
        dtype: its dtype.
        copied: it is one input as it is, but for the dtype.
        cast: it is not of the dtype that its input has.
    """

    name: str
    inputs: tuple[Taken, ...]
    base: int | None
    parameters: Mapping[str, Any]
    size: torch.Size
    computed: torch.dtype
    dtype: torch.dtype
    copied: bool
    cast: bool


@dataclass(frozen=True)
class Merge:
    """A plan that was found to fit its models.

    Attributes:
        plan: the plan.
        method: its merge method.
        tensors: what the result consists of, by name.
        ties: names of the result that are one tensor with another, and that one's name.
        layers: for a stack of layers the numbers that its layers had in the models; empty for whole models.
        notes: sentences that the user should read.
    """

    plan: Plan
    method: Method
    tensors: Mapping[str, Made]
    ties: Mapping[str, str]
    layers: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Tensors of the result that are made of the same layers.

    Attributes:
        of: the slice that they belong to.
        held: for each of its sources the tensors' names, by what the result's names end in.
        prefix: what the result's names begin with.
        layer: the layers' number in the first source; None outside of the layers.
        t: the position in the slice; None where each tensor has its own.
    """

    of: PlanSlice
    held: tuple[Mapping[str, str], ...]
    prefix: str = ""
    layer: int | None = None
    t: float | None = 0.0


def resolve(plan: Plan, catalogs: Mapping[str, Catalog]) -> Merge:
    """See what each tensor of the result is made of, and that all of it can be made.

    Args:
        plan: the plan.
        catalogs: what each of ``plan.models`` holds, in the names of the live model, as mergekit merges them.

    Raises:
        RecipeError: the plan and its models do not go together. No tensor was read.
    """
    method = method_named(plan.method)
    notes = check_parameters(plan, method)
    bodies = {model: anatomy(model, catalogs[model].weights) for model in plan.models}
    bases = {id(one): check_sources(one, method, plan) for one in plan.slices}
    tensors: dict[str, Made] = {}
    for group in _groups(plan, bodies):
        matches, left_out = matched(group.of, group.held)
        notes += left_out
        check_built(group.of, group.layer, matches, bodies[plan.leader], catalogs)
        for end, names in matches.items():
            made = _made(plan, method, group, end, names, bases[id(group.of)], bodies, catalogs)
            tensors[made.name] = made
    layers = {bodies[plan.leader].only: _numbers(plan)} if plan.slices[0].sources[0].layers is not None else {}
    order = list(dict.fromkeys([*catalogs[plan.leader].weights, *tensors]))
    tensors = {name: tensors[name] for name in order if name in tensors}
    ties = _ties(tensors, catalogs, catalogs[plan.leader])
    return Merge(plan, method, tensors, ties, layers, tuple(dict.fromkeys(notes)))


def picks(merge: Merge) -> dict[str, tuple[str, str]] | None:
    """Return the model and the name there of each tensor of the result; None if the merge computes any.

    So it is a passthrough without ``scale`` in which no tensor is given another dtype.
    """
    if not all(made.copied and not made.cast for made in merge.tensors.values()):
        return None
    found = {}
    for name in [*merge.tensors, *merge.ties]:
        taken = merge.tensors[merge.ties.get(name, name)].inputs[0]
        found[name] = (taken.model, name if name in merge.ties else taken.name)
    return found


def _groups(plan: Plan, bodies: Mapping[str, Anatomy]) -> Iterator[Group]:
    """Yield the result's groups in their order: what is before the layers, the layers, and the rest."""
    first, last = plan.slices[0], plan.slices[-1]
    if first.sources[0].layers is None:
        held = [dict.fromkeys(bodies[source.model].names) for source in first.sources]
        yield Group(first, tuple({name: name for name in names} for names in held), t=None)
        return
    stack = bodies[plan.leader].only
    yield Group(first, tuple(bodies[source.model].before for source in first.sources))
    number = 0
    for one in plan.slices:
        count = _length(one, bodies)
        for index in range(count):
            held_there = tuple(bodies[source.model].layers[_first(source) + index] for source in one.sources)
            layer = _first(one.sources[0]) + index
            yield Group(one, held_there, f"{stack}.{number}", layer, position(index, count))
            number += 1
    if number == 0:
        raise RecipeError(f"{first.where}: no slice has layers, so the result would have none; add one that has.")
    yield Group(last, tuple(bodies[source.model].after for source in last.sources))


def _first(source: PlanSource) -> int:
    return source.layers[0] if source.layers else 0


def _length(one: PlanSlice, bodies: Mapping[str, Anatomy]) -> int:
    """Return how many layers a slice has."""
    counts = {source.model: (source.layers or (0, 0))[1] - _first(source) for source in one.sources}
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{count} of {model}" for model, count in counts.items())
        raise RecipeError(f"{one.where}: the sources of a slice have as many layers each, and these are {said}.")
    for source in one.sources:
        body, (first, stop) = bodies[source.model], source.layers or (0, 0)
        if body.only and stop > len(body.layers) and stop > first:
            raise RecipeError(
                f"{source.where}: {source.model} has the layers 0 to {len(body.layers) - 1} and no layer {stop - 1}; "
                f"end the layer_range at {len(body.layers)} or before."
            )
    return counts[one.sources[0].model]


def _numbers(plan: Plan) -> tuple[int, ...]:
    return tuple(number for one in plan.slices for number in range(*(one.sources[0].layers or (0, 0))))


def _made(
    plan: Plan,
    method: Method,
    group: Group,
    end: str,
    names: tuple[str, ...],
    base: int | None,
    bodies: Mapping[str, Anatomy],
    catalogs: Mapping[str, Catalog],
) -> Made:
    name = group.prefix + end
    sources = group.of.sources
    t = group.t
    if t is None:
        place = bodies[sources[0].model].places.get(end)
        t = position(*place) if place else 0.0
    inputs = tuple(
        Taken(source.model, held, _of_model(plan, method, group.of, source, held, t, number == base))
        for number, (source, held) in enumerate(zip(sources, names, strict=True))
    )
    shared = {p.name: _value(p, plan.scopes(group.of, None), name, t, group.of.where, name) for p in method.parameters}
    read = [catalogs[taken.model].weights[taken.name] for taken in inputs]
    computed, dtype = _dtypes(plan, [tensor.dtype for tensor in read])
    plain = method.name == PASSTHROUGH and all(value is None for value in inputs[0].parameters.values())
    return Made(
        name=name,
        inputs=inputs,
        base=base,
        parameters=shared,
        size=read[0].size,
        computed=computed,
        dtype=dtype,
        copied=plain,
        cast=not read[0].dtype == computed == dtype,
    )


def _of_model(
    plan: Plan, method: Method, one: PlanSlice, source: PlanSource, tensor: str, t: float, is_base: bool
) -> dict[str, Any]:
    taken = [parameter for parameter in method.model_parameters if parameter.of_base or not is_base]
    what = f"{tensor} of {source.model}"
    return {p.name: _value(p, plan.scopes(one, source), tensor, t, source.where, what) for p in taken}


def _value(parameter: Any, scopes: Iterable[Mapping[str, Any]], tensor: str, t: float, where: str, what: str) -> Any:
    try:
        return value_of(parameter, scopes, tensor, t, what)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def _dtypes(plan: Plan, dtypes: list[torch.dtype]) -> tuple[torch.dtype, torch.dtype]:
    """Return what is computed in, and what the result is cast to; only floating point is given another dtype."""
    if not all(dtype.is_floating_point for dtype in dtypes):
        return dtypes[0], dtypes[0]
    wide = [dtype if dtype.itemsize > 1 else torch.float32 for dtype in dtypes] if len(dtypes) > 1 else dtypes
    computed = plan.dtype or reduce(torch.promote_types, wide)
    return computed, plan.out_dtype or computed


def _ties(tensors: dict[str, Made], catalogs: Mapping[str, Catalog], leader: Catalog) -> dict[str, str]:
    """Take tied tensors out of those that are made, where they are tied in every model that they come from.

    And in the leader, if it has them: its configuration, which the result has, says whether there are two.
    """
    ties = {model: catalog.ties for model, catalog in catalogs.items()}
    found: dict[str, str] = {}
    for name, made in tensors.items():
        main = ties[made.inputs[0].model].get(name)
        if main is None or main not in tensors:
            continue
        models = [taken.model for taken in (*made.inputs, *tensors[main].inputs)]
        plain = all(taken.name == of.name for of in (made, tensors[main]) for taken in of.inputs)
        apart = {name, main} <= leader.weights.keys() and leader.weights[name] is not leader.weights[main]
        if plain and not apart and all(ties[model].get(name) == main for model in models):
            found[name] = main
    for name in found:
        del tensors[name]
    return found
