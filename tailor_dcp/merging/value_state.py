"""What becomes of an optimizer's state where values are merged: only what a recipe says, and never a guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tailor_dcp.catalog import STEP, Catalog
from tailor_dcp.merging.catalogs import Repeated
from tailor_dcp.merging.value_tensors import Largest, Mean
from tailor_dcp.names import listed
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.mergekit_plan import Made, Merge, Taken, picks
from tailor_dcp.recipes.native import AVERAGE, DROP, KEEP
from tailor_dcp.tensors import Readable

LINEAR = "linear"
_WEIGHT = "weight"

Kinds = dict[str, Readable]
"""A parameter's states by their kinds."""


def with_state(catalog: Catalog, merge: Merge, sources: Mapping[str, Catalog], optimizer: str | None) -> Catalog:
    """Give the result the optimizer's state that is asked for, with param groups and the training's progress.

    Args:
        catalog: the result, with its weights.
        merge: the resolved plan.
        sources: what each model holds.
        optimizer: see ``value_catalog``.

    Raises:
        RecipeError: nothing is asked for though there is state, or what is asked for is not there or makes no sense.
    """
    stateful = [model for model in merge.plan.models if sources[model].state]
    if optimizer is None:
        optimizer = _default(merge, stateful)
    if optimizer == DROP:
        return catalog
    if optimizer == AVERAGE:
        return _given(catalog, merge, sources, merge.plan.leader, _averaged(merge, sources))
    if optimizer == KEEP:
        _check_kept(merge, stateful)
        return _given(catalog, merge, sources, merge.plan.leader, {n: m.inputs[0] for n, m in merge.tensors.items()})
    if optimizer not in stateful:
        raise RecipeError(
            f"{merge.plan.name}: optimizer: {optimizer} names no model of the plan that has optimizer state; those "
            f"that have: {listed(stateful)}."
        )
    return _given(catalog, merge, sources, optimizer, _all_of(merge, optimizer))


def _default(merge: Merge, stateful: list[str]) -> str:
    if not stateful:
        return DROP
    if picks(merge) is not None:
        return KEEP
    ways = [DROP, *([AVERAGE] if merge.method.name == LINEAR else []), *stateful]
    raise RecipeError(
        f"{merge.plan.name}: {stateful[0]} has optimizer state, and the plan does not say what becomes of it; "
        f"say optimizer: {listed(ways)}."
    )


def _check_kept(merge: Merge, stateful: list[str]) -> None:
    if not all(made.copied for made in merge.tensors.values()):
        raise RecipeError(
            f"{merge.plan.name}: only a passthrough without scale can keep moments; say optimizer: "
            f"{listed([DROP, *stateful])}."
        )


def _all_of(merge: Merge, model: str) -> dict[str, Taken]:
    """Return which tensor of one model each of the result's gets its moments from."""
    found = {}
    for name, made in merge.tensors.items():
        taken = next((taken for taken in made.inputs if taken.model == model), None)
        if taken is None:
            raise RecipeError(
                f"{merge.plan.name}: {name} is not made of anything of {model}, so there are no moments of {model} for "
                f"it; say optimizer: drop."
            )
        found[name] = taken
    return found


def _averaged(merge: Merge, sources: Mapping[str, Catalog]) -> dict[str, Kinds]:
    """Return the mean of all models' moments, weighted as the weights are.

    The result's ``step`` is the largest: with a smaller one Adam would scale the moments up as if they had just begun.
    """
    if merge.method.name != LINEAR:
        raise RecipeError(
            f"{merge.plan.name}: moments can be averaged where weights are, by the method 'linear', not by "
            f"{merge.method.name!r}; say optimizer: drop, or name the model that they come from."
        )
    return {name: kinds for name, made in merge.tensors.items() if (kinds := _mean(merge, made, sources))}


def _mean(merge: Merge, made: Made, sources: Mapping[str, Catalog]) -> Kinds:
    held = [sources[taken.model].state.get(taken.name, {}) for taken in made.inputs]
    if not any(held):
        return {}
    for taken, kinds in zip(made.inputs, held, strict=True):
        if kinds.keys() != held[0].keys():
            odd = sorted(set(kinds) ^ set(held[0]))[0]
            raise RecipeError(
                f"{merge.plan.name}: {odd} of {made.name} is not in all models ({taken.model} and "
                f"{made.inputs[0].model} differ), so there is no mean of it; say optimizer: drop."
            )
    weights = [float(taken.parameters[_WEIGHT]) for taken in made.inputs]
    if min(weights) < 0 or sum(weights) == 0:
        raise RecipeError(
            f"{merge.plan.name}: the weights {weights} of {made.name} give no mean of moments, which must not become "
            f"negative; say optimizer: drop."
        )
    weights = [weight / sum(weights) for weight in weights]
    mean: Kinds = {}
    for kind in held[0]:
        tensors = [kinds[kind] for kinds in held]
        if any(tensor.size != tensors[0].size for tensor in tensors):
            raise RecipeError(f"{merge.plan.name}: {kind} of {made.name} differs in shape; say optimizer: drop.")
        whole = kind == STEP or not tensors[0].dtype.is_floating_point
        mean[kind] = Largest(tensors) if whole else Mean(tensors, weights)
    return mean


def _given(
    catalog: Catalog, merge: Merge, sources: Mapping[str, Catalog], leader: str, state: Mapping[str, Kinds | Taken]
) -> Catalog:
    """Return the result with its state; param groups and progress come from one model."""
    if not sources[leader].state:
        raise RecipeError(f"{merge.plan.name}: {leader} has no optimizer state; say optimizer: drop.")
    taken = {name: given for name, given in state.items() if isinstance(given, Taken)}
    states: dict[str, Kinds] = {name: given for name, given in state.items() if not isinstance(given, Taken)}
    states |= _moved(taken, sources)
    origins = {name: taken.get(name) or _of(merge.tensors[name], leader) for name in merge.tensors}
    groups = _groups(merge, sources, leader, origins)
    return replace(catalog, state=states, groups=groups, train=dict(sources[leader].train))


def _moved(taken: Mapping[str, Taken], sources: Mapping[str, Catalog]) -> dict[str, Kinds]:
    """Return models' own states under the result's names; a layer that is there twice has states of its own."""
    seen: set[tuple[str, str]] = set()
    found: dict[str, Kinds] = {}
    for name, one in taken.items():
        kinds = dict(sources[one.model].state.get(one.name, {}))
        if (one.model, one.name) in seen:
            kinds = {kind: Repeated(tensor) for kind, tensor in kinds.items()}
        seen.add((one.model, one.name))
        if kinds:
            found[name] = kinds
    return found


def _of(made: Made, model: str) -> Taken:
    return next((taken for taken in made.inputs if taken.model == model), made.inputs[0])


def _groups(
    merge: Merge, sources: Mapping[str, Catalog], leader: str, origins: Mapping[str, Taken]
) -> tuple[dict[str, Any], ...]:
    """Return the leader's param groups, with the result's names: each in the group that it had in its own model."""
    groups = sources[leader].groups
    members: list[list[str]] = [[] for _ in groups]
    index = {
        model: {name: number for number, group in enumerate(held.groups) for name in group["params"]}
        for model, held in sources.items()
    }
    for name, taken in origins.items():
        number = index[taken.model].get(taken.name)
        if number is None:
            continue
        if number >= len(groups):
            raise RecipeError(
                f"{merge.plan.name}: {taken.model} has more param groups than {leader}, so {name} has no group in the "
                f"result; say optimizer: drop."
            )
        members[number].append(name)
    return tuple({**group, "params": held} for group, held in zip(groups, members, strict=True))
