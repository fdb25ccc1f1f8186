"""Placing: which layers the result has, and which layer of its source fills each. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tailor_dcp.layers import LayerMap
from tailor_dcp.merging.index import Index
from tailor_dcp.names import alternatives, below, close, listed, matches
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import Recipe


@dataclass(frozen=True)
class Placing:
    """The layers of the result.

    Attributes:
        fills: each of them, in order, with the layer of its source that fills it.
        resized: the stacks of layers that are longer or shorter than the base's.
    """

    fills: Mapping[str, str]
    resized: frozenset[str] = frozenset()


def placed(recipe: Recipe, base: Index, indexes: Mapping[str, Index]) -> Placing:
    """Return the layers of the result.

    Raises:
        RecipeError: a name means nothing, two layers fill one, or a stack of layers has a gap.
    """
    fills = {layer: layer for layer in base.layers}
    fills |= _added(recipe, indexes)
    fills |= _renames(recipe, list(fills), base, indexes)
    for pattern in recipe.drop:
        gone = [layer for layer in fills if named_by(layer, pattern)]
        if not gone:
            raise RecipeError(f"{recipe.name} drops {pattern}, which is no layer; {_near(pattern, fills)}")
        for layer in gone:
            del fills[layer]
    if not fills:
        raise RecipeError(f"{recipe.name} drops all layers; leave some.")
    _check_takes(recipe, fills)
    before, after = _stacks(base.layers), _stacks(fills)
    _check_gaps(recipe, before, after)
    return Placing(_ordered(fills), frozenset(stack for stack in after if before.get(stack) != after[stack]))


def _added(recipe: Recipe, indexes: Mapping[str, Index]) -> dict[str, str]:
    """Return the layers that only sources other than the base have, and that the recipe takes from them.

    A ``*`` means layers that the result has anyway: ``model.layers.*`` of a deeper source makes no model deeper.
    """
    named = ((glob, take.source) for take in recipe.takes for glob in alternatives(take.layers) if "*" not in glob)
    return {layer: layer for glob, source in named for layer in indexes[source].layers if named_by(layer, glob)}


def named_by(layer: str, pattern: str) -> str | None:
    """Return what a glob calls by its name: a layer, or the numbered block that it is a part of.

    Parts of blocks are layers where users want experts, or whatever their patterns say, to be layers of their own.

    Returns:
        The outermost such name; None if the glob does not mean the layer.
    """
    parts = layer.split(".")
    block = next((number for number, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    names = (".".join(parts[: end + 1]) for end in range(block, len(parts)))
    return next((name for name in names if matches(name, pattern)), None)


def _renames(recipe: Recipe, there: list[str], base: Index, indexes: Mapping[str, Index]) -> dict[str, str]:
    """Return the layers that the recipe fills from one of another name."""
    known = list(dict.fromkeys([*base.layers, *(layer for index in indexes.values() for layer in index.layers)]))
    found: dict[str, str] = {}
    for old, targets in recipe.rename.items():
        meant = [layer for layer in known if below(layer, old)]
        if not meant:
            inside = next((layer for layer in known if below(old, layer)), None)
            why = (
                f"is a part of the layer {inside}: name whole layers."
                if inside
                else f"is no layer; {_near(old, known)}"
            )
            raise RecipeError(f"{recipe.name} renames {old}, which {why}")
        for target in targets:
            for layer in meant:
                new = target + layer[len(old) :]
                if found.get(new, layer) != layer:
                    raise RecipeError(
                        f"{recipe.name} fills {new} with {found[new]} and with {layer}; give each layer one."
                    )
                _check_name(recipe, layer, new, indexes)
                found[new] = layer
    return found


def _check_name(recipe: Recipe, layer: str, new: str, indexes: Mapping[str, Index]) -> None:
    """Refuse a name under which a layer would fall apart, or into another one; layers of users' own are left alone."""
    layers, place = LayerMap(), LayerMap.position(new)
    for index in indexes.values():
        for fqn in (held.fqn for kinds in index.by_layer.get(layer, {}).values() for held in kinds):
            becomes = layers.layer(new + fqn[len(layer) :])
            counted = place is None or new.startswith(f"{place[0]}.{place[1]}") or not place[0]
            if layers.layer(fqn) == layer and not (becomes == new and counted):
                raise RecipeError(
                    f"{recipe.name} would fill {new} with {layer}, but that is no name for such a layer; name it as "
                    f"{layer} is named."
                )


def _check_takes(recipe: Recipe, fills: Mapping[str, str]) -> None:
    for take in recipe.takes:
        for pattern in alternatives(take.layers):
            if not any(named_by(layer, pattern) for layer in fills):
                raise RecipeError(
                    f"{recipe.name} takes {pattern} from {take.source}, but the result has no such layer; "
                    f"{_near(pattern, fills)}"
                )


def _check_gaps(recipe: Recipe, before: Mapping[str, set[int]], after: Mapping[str, set[int]]) -> None:
    """A model's blocks are counted from 0 without a gap; a model with one could not be made."""
    for stack, numbers in after.items():
        whole = stack not in before or before[stack] == set(range(len(before[stack])))
        missing = next((n for n in range(len(numbers)) if n not in numbers), None)
        if whole and missing is not None:
            raise RecipeError(
                f"{recipe.name} leaves no {stack}.{missing} before {stack}.{max(numbers)}; rename the layers after it "
                f"so that they are counted without a gap."
            )


def _stacks(layers: Mapping[str, str] | tuple[str, ...]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for layer in layers:
        place = LayerMap.position(layer)
        if place is not None and layer == f"{place[0]}.{place[1]}":
            found.setdefault(place[0], set()).add(place[1])
    return found


def _ordered(fills: Mapping[str, str]) -> dict[str, str]:
    """Return the layers with those of a stack in their order, where the first of the stack was."""
    layers = list(fills)
    first: dict[str, int] = {}
    for number, layer in enumerate(layers):
        first.setdefault(_stack(layer), number)
    places = {layer: number for number, layer in enumerate(layers)}

    def rank(layer: str) -> tuple[int, int, int]:
        place = LayerMap.position(layer)
        return (first[_stack(layer)], place[1] if place else 0, places[layer])

    return {layer: fills[layer] for layer in sorted(layers, key=rank)}


def _stack(layer: str) -> str:
    place = LayerMap.position(layer)
    return place[0] if place else layer


def _near(name: str, known: Mapping[str, str] | list[str]) -> str:
    return f"did you mean {listed(close(name, known))}?"


def numbers_of(fills: Mapping[str, str], before: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return, for each stack whose layers are others than in the base, the numbers that its layers had.

    Args:
        fills: the layers of the result, in order, each with the one that fills it.
        before: the layers of the base.
    """
    found: dict[str, list[int]] = {}
    for layer, origin in fills.items():
        here, there = LayerMap.position(layer), LayerMap.position(origin)
        if here is not None and there is not None and layer == f"{here[0]}.{here[1]}":
            found.setdefault(here[0], []).append(there[1])
    counts = _stacks(tuple(before))
    return {
        stack: tuple(numbers) for stack, numbers in found.items() if numbers != list(range(len(counts.get(stack, ()))))
    }
