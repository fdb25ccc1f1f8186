"""What becomes of an optimizer's state where values are merged: only what a recipe says, and never a guess."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tailor_dcp.catalog import STEP, Catalog
from tailor_dcp.merging.catalogs import Repeated
from tailor_dcp.merging.index import numbered_of, progress_of
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
    if optimizer != DROP:
        _check_named(merge, sources)
    if optimizer is None:
        optimizer = _default(merge, stateful)
    if optimizer == DROP:
        return replace(catalog, train=progress_of(sources[merge.plan.leader]))
    if optimizer == AVERAGE:
        return _given(catalog, merge, sources, stateful, _averaged(merge, sources))
    if optimizer == KEEP:
        _check_kept(merge, stateful)
        return _given(catalog, merge, sources, stateful, {n: m.inputs[0] for n, m in merge.tensors.items()})
    if optimizer not in stateful:
        raise RecipeError(
            f"{merge.plan.name}: optimizer: {optimizer} names no model of the plan that has optimizer state; those "
            f"that have: {listed(stateful)}."
        )
    return _given(catalog, merge, sources, [optimizer], _all_of(merge, optimizer))


def _check_named(merge: Merge, sources: Mapping[str, Catalog]) -> None:
    """Refuse to lose state without a word that nothing tells whose it is."""
    for model in merge.plan.models:
        if numbered_of(sources[model]):
            raise RecipeError(
                f"{merge.plan.name}: {model} keeps its optimizer's state under numbers, which tell no parameter; save "
                f"it by names (TrainState, or torch's get_state_dict), or say optimizer: drop."
            )


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
    catalog: Catalog,
    merge: Merge,
    sources: Mapping[str, Catalog],
    stateful: Sequence[str],
    state: Mapping[str, Kinds | Taken],
) -> Catalog:
    """Return the result with its state; param groups and progress come from the leader.

    A leader that was never trained, such as a base model in a Hugging Face folder, has none: then they come from the
    first model that the moments are of.
    """
    if not stateful:
        raise RecipeError(f"{merge.plan.name}: no model has optimizer state; say optimizer: drop.")
    models = (merge.plan.leader, *stateful)
    leader = next((model for model in models if sources[model].groups), stateful[0])
    train = next((sources[model].train for model in models if sources[model].train), {})
    taken = {name: given for name, given in state.items() if isinstance(given, Taken)}
    states: dict[str, Kinds] = {name: given for name, given in state.items() if not isinstance(given, Taken)}
    states |= _moved(taken, sources)
    origins = {name: taken.get(name) or made.inputs[0] for name, made in merge.tensors.items()}
    groups = _groups(merge, sources, leader, origins, states.keys())
    return replace(catalog, state=states, groups=groups, train=dict(train))


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


def _groups(
    merge: Merge,
    sources: Mapping[str, Catalog],
    leader: str,
    origins: Mapping[str, Taken],
    stateful: Collection[str],
) -> tuple[dict[str, Any], ...]:
    """Return the leader's param groups, with the result's names: each in the group that it has in the leader.

    What the leader's model does not have is in the group that it had in its own.
    """
    groups = sources[leader].groups
    members: list[list[str]] = [[] for _ in groups]
    index = {
        model: {name: number for number, group in enumerate(held.groups) for name in group["params"]}
        for model, held in sources.items()
    }
    for name, taken in origins.items():
        own = next((one.name for one in merge.tensors[name].inputs if one.model == leader), taken.name)
        known = own in sources[leader].weights
        number = index[leader].get(own) if known else index[taken.model].get(taken.name)
        if number is not None and number < len(groups):
            members[number].append(name)
        elif number is not None:
            raise RecipeError(
                f"{merge.plan.name}: {taken.model} has more param groups than {leader}, so {name} has no group in the "
                f"result; say optimizer: drop."
            )
        elif name in stateful and index[leader]:
            raise RecipeError(
                f"{merge.plan.name}: {leader}, from which the param groups come, does not train {own}, and {name} has "
                f"optimizer state from {taken.model}; make {taken.model} the first model, or say optimizer: drop."
            )
    return tuple({**group, "params": held} for group, held in zip(groups, members, strict=True))
