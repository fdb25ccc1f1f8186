"""Checks: what a recipe must not ask for, and what must be true of a result as a whole. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tailor_dcp.merging.index import Index
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import AVERAGE, DROP, KEEP, Recipe
from tailor_dcp.units import WEIGHT

if TYPE_CHECKING:
    from tailor_dcp.merging.resolve import Slot


def optimizer(recipe: Recipe, indexes: Mapping[str, Index]) -> None:
    """Check that what a recipe says of the optimizer is possible and no contradiction.

    Raises:
        RecipeError: it is not.
    """
    if recipe.optimizer == AVERAGE:
        raise RecipeError(
            f"{recipe.name}: optimizer: average has no meaning where no values are merged; every layer keeps its own "
            f"moments with keep."
        )
    if recipe.optimizer == KEEP:
        for take in recipe.takes:
            _check_numbered(indexes[take.source], take.kinds is None or set(take.kinds) != {WEIGHT})
        trained = recipe.train or recipe.base
        _check_numbered(indexes[recipe.base], bool(recipe.rename or recipe.drop) or trained != recipe.base)
        _check_numbered(indexes[recipe.base if trained == DROP else trained], trained != recipe.base)
        return
    asked = next((kind for take in recipe.takes for kind in take.kinds or () if kind != WEIGHT), None)
    if asked:
        raise RecipeError(
            f"{recipe.name} takes {asked} of some layers and says optimizer: {recipe.optimizer} for all; leave one of "
            f"the two out."
        )
    if recipe.optimizer != DROP:
        for name in (recipe.optimizer, recipe.train or recipe.base):
            _check_numbered(indexes[recipe.optimizer if name == DROP else name], True)
        if not indexes[recipe.optimizer].has_states:
            raise RecipeError(
                f"{recipe.optimizer} has no optimizer state that could be taken; say optimizer: keep or drop, or name "
                f"another checkpoint."
            )


def named(recipe: Recipe, base: Index) -> None:
    """Refuse to write a format that keeps an optimizer's state by names, where nothing tells them.

    Raises:
        RecipeError: the base's optimizer would be lost.
    """
    _check_numbered(base, recipe.optimizer != DROP)


def _check_numbered(index: Index, asked: bool) -> None:
    if asked and index.numbered:
        raise RecipeError(
            f"{index.name} keeps its optimizer's state under numbers, which tell no layer: save it by names "
            f"(TrainState, or torch's get_state_dict), take weights alone (kinds: [weight]), or drop the optimizer "
            f"(optimizer: drop)."
        )


def states(recipe: Recipe, indexes: Mapping[str, Index], slots: Iterable[Slot], layers: Iterable[str]) -> None:
    """Refuse a result in which the optimizer knows some layers and has never seen others.

    Layers that a source with an optimizer has no state of are frozen, and no fault.

    Raises:
        RecipeError: naming a layer without.
    """
    if recipe.optimizer == DROP:
        return
    layers = list(layers)
    # Another number of layers, and a number means another parameter.
    _check_numbered(indexes[recipe.base], {*layers} != {*indexes[recipe.base].layers})
    stateful: set[str] = set()
    source: dict[str, str] = {}
    for slot in slots:
        if slot.unit.kind == WEIGHT:
            source[slot.unit.layer] = slot.source
        else:
            stateful.add(slot.unit.layer)
    for layer in layers if stateful else ():
        if layer in stateful or layer not in source:
            continue
        name = source[layer] if recipe.optimizer == KEEP else recipe.optimizer
        if not indexes[name].has_states:
            raise RecipeError(
                f"{name} has no optimizer state, so {layer} would have none where other layers have some; take weights "
                f"alone (kinds: [weight]), or drop the optimizer (optimizer: drop)."
            )


def groups(indexes: Mapping[str, Index], trained: Index | None, slots: Iterable[Slot]) -> None:
    """Check that the param groups know every parameter that has optimizer state.

    Args:
        indexes: the sources.
        trained: the one that the param groups come from; None for none, as the recipe asks for.
        slots: the result.

    Raises:
        RecipeError: naming a parameter, and the source that knows it.
    """
    if trained is None:
        return
    for slot in slots:
        if slot.unit.kind == WEIGHT or not indexes[slot.source].groups:
            continue
        # What lists of names follow: the parameter that the layer was filled with, where they know such a one.
        old = slot.held.fqn if slot.held.fqn in trained.fqns else slot.fqn
        if not trained.groups or not trained.groups_know(old):
            raise RecipeError(
                f"{trained.name}, from which the param groups come, does not know {slot.held.fqn} with its "
                f"{slot.unit.kind} from {slot.source}; take them from there (train: {slot.source}), or drop the "
                f"optimizer (optimizer: drop)."
            )


def ages(recipe: Recipe, slots: Iterable[Slot], step: int | None) -> None:
    """Refuse what is older than the recipe allows.

    Raises:
        RecipeError: naming the unit.
    """
    bound = recipe.max_stale_steps
    if bound is None:
        return
    for slot in slots:
        age = None if step is None or slot.held.step is None else step - slot.held.step
        if age is None:
            raise RecipeError(
                f"{slot.source} does not tell the step of {slot.unit}, so max_stale_steps cannot be held; leave it out."
            )
        if age > bound:
            raise RecipeError(
                f"{slot.unit} in {slot.source} is of step {slot.held.step}, {age} steps older than the result's "
                f"{step}, and max_stale_steps is {bound}; take it from a newer checkpoint."
            )
