"""Resolving: a recipe and the indexes of its sources give, for each tensor of the result, where it comes from.

Everything that can be wrong with a recipe is found here, before anything is written. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tailor_dcp.merging.index import Held, Index
from tailor_dcp.merging.placing import Placing, placed
from tailor_dcp.names import close, listed, matches
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import AVERAGE, DROP, KEEP, Recipe, Take
from tailor_dcp.units import STEP, WEIGHT, Unit


@dataclass(frozen=True)
class Slot:
    """A tensor of the result.

    Attributes:
        key: its key in the result's flattened state dict.
        fqn: the parameter's name there.
        unit: its layer and kind there.
        source: the source that it comes from.
        held: what it is in that source.
    """

    key: str
    fqn: str
    unit: Unit
    source: str
    held: Held


@dataclass(frozen=True)
class Resolved:
    """Where everything in the result comes from.

    Attributes:
        slots: each parameter, buffer and optimizer state of the result, in its order.
        train: the source of what belongs to no layer; None for nothing.
        renamed: for each parameter of the sources that has another name, or more than one, in the result: these.
        dropped: the parameters of the base that are not in the result.
        optimizer: whether the result has an optimizer.
        step: the result's training step.
        layers: for each layer of the result, the one that fills it as its source calls it.
        notes: what the user should know.
    """

    slots: Mapping[str, Slot]
    train: str | None
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    optimizer: bool = True
    step: int | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def renames(self) -> bool:
        """Whether names of parameters differ from those in the base."""
        return bool(self.renamed or self.dropped)


def sources_of(recipe: Recipe) -> list[str]:
    """Return the names of all sources of a recipe, the base first."""
    named = [recipe.base, *(take.source for take in recipe.takes)]
    named += [name for name in (recipe.train,) if name not in (None, DROP)]
    named += [recipe.optimizer] if recipe.optimizer not in (KEEP, DROP, AVERAGE) else []
    return list(dict.fromkeys(named))


def resolve(recipe: Recipe, indexes: Mapping[str, Index]) -> Resolved:
    """Find where each tensor of the result comes from.

    Args:
        recipe: what to put together.
        indexes: what each of ``sources_of(recipe)`` holds.

    Raises:
        RecipeError: the recipe asks for what there is not, or contradicts itself.
    """
    if recipe.optimizer == AVERAGE:
        raise RecipeError(
            f"{recipe.name}: optimizer: average has no meaning where no values are merged; every layer keeps its own "
            f"moments with keep."
        )
    return _Resolver(recipe, indexes).resolved()


class _Resolver:
    def __init__(self, recipe: Recipe, indexes: Mapping[str, Index]) -> None:
        self.recipe, self.indexes = recipe, indexes
        self.base = indexes[recipe.base]
        self.place: Placing = placed(recipe, self.base, indexes)

    def resolved(self) -> Resolved:
        slots: dict[str, Slot] = {}
        for layer, origin in self.place.fills.items():
            for slot in self._layer(layer, origin):
                slots[slot.key] = slot
        kept = recipe_train(self.recipe)
        optimizer = self.recipe.optimizer != DROP and any(slot.unit.kind != WEIGHT for slot in slots.values())
        self._check_states(slots)
        self._check_ties(slots)
        step = self.indexes[kept].step if kept else self.base.step
        self._check_age(slots, step)
        return Resolved(
            slots,
            kept,
            _renamed(slots.values()),
            self._dropped(slots.values()),
            optimizer,
            step,
            self.place.fills,
            tuple(_notes(slots.values(), self.base)),
        )

    # One layer of the result -------------------------------------------------------------

    def _layer(self, layer: str, origin: str) -> Iterable[Slot]:
        """Yield what a layer of the result consists of."""
        weights = self._source_of(layer, WEIGHT)
        yield from self._tensors(layer, origin, WEIGHT, weights)
        for kind in self._kinds(layer, origin):
            yield from self._tensors(layer, origin, kind, self._source_of(layer, kind))

    def _kinds(self, layer: str, origin: str) -> list[str]:
        """Return the optimizer states that the layer has in any of the sources that it is taken from."""
        if self.recipe.optimizer == DROP:
            return []
        named = [source for take in self._takes(layer) for source in (take.source,)] or [self.recipe.base]
        if self.recipe.optimizer != KEEP:
            named = [self.recipe.optimizer]
        elif any(take.kinds is not None for take in self._takes(layer)):
            named.append(self.recipe.base)
        kinds = dict.fromkeys(kind for name in named for kind in self.indexes[name].by_layer.get(origin, {}))
        asked = dict.fromkeys(kind for take in self._takes(layer) for kind in take.kinds or ())
        return [kind for kind in kinds | asked if kind != WEIGHT]

    def _takes(self, layer: str) -> list[Take]:
        return [take for take in self.recipe.takes if matches(layer, take.layers)]

    def _source_of(self, layer: str, kind: str) -> str:
        """Return the source of a unit of the result."""
        if kind != WEIGHT and self.recipe.optimizer not in (KEEP, DROP):
            return self.recipe.optimizer
        takes = [take for take in self._takes(layer) if _gives(take, kind)]
        exact = [take for take in takes if take.layers == layer]
        named = list(dict.fromkeys(take.source for take in exact or takes))
        if len(named) > 1:
            raise RecipeError(
                f"{self.recipe.name} takes the {kind} of {layer} from {listed(named).replace(' or ', ' and ')}; name "
                f"the layer itself to say which."
            )
        return named[0] if named else self.recipe.base

    def _tensors(self, layer: str, origin: str, kind: str, source: str) -> Iterable[Slot]:
        """Yield one kind of a layer of the result; everything that the base has there must be in the source."""
        index = self.indexes[source]
        found = index.by_layer.get(origin, {}).get(kind, [])
        wanted = self._model_of(layer, origin, kind, source)
        if not found:
            if wanted:
                raise self._missing(layer, origin, kind, index)
            return
        have = {_inner(held.fqn, origin) for held in found}
        need = {_inner(held.fqn, origin): held for held in wanted}
        for name, held in need.items():
            if name not in have:
                raise RecipeError(f"{index.name} has no {held.kind} of {held.fqn}, which {layer} needs.")
        for held in found:
            model = need.get(_inner(held.fqn, origin))
            if need and model is None:
                raise RecipeError(f"{index.name} has a {kind} of {held.fqn} that {layer} has not in {self.base.name}.")
            if model is not None and model.shape.size != held.shape.size:
                raise RecipeError(
                    f"{held.fqn} ({kind}) has the shape {_shape(held)} in {index.name} and {_shape(model)} in "
                    f"{self.base.name}; only layers of one shape can be put together."
                )
            fqn = layer + held.fqn[len(origin) :] if layer != origin else held.fqn
            yield Slot(self._key(held, fqn), fqn, Unit(layer, kind), source, held)

    def _model_of(self, layer: str, origin: str, kind: str, source: str) -> list[Held]:
        """Return what the base has where a unit goes, or where it comes from: the source must have just that."""
        if kind != WEIGHT and not self.base.has_states and self.indexes[source].has_states:
            return []
        for name in (origin, layer):
            if found := self.base.by_layer.get(name, {}).get(kind):
                return [_moved(held, name, origin) for held in found]
        return []

    def _key(self, held: Held, fqn: str) -> str:
        """Return the key of a tensor of the result, as the base calls such tensors."""
        alike = self.base.find(held.key, held.fqn, held.kind) or held
        head, found, tail = alike.key.rpartition(alike.fqn)
        return head + fqn + tail if found else fqn

    def _missing(self, layer: str, origin: str, kind: str, index: Index) -> RecipeError:
        if origin not in index.by_layer:
            return RecipeError(
                f"{index.name} has no layer {origin}, which {layer} shall be filled with; did you mean "
                f"{listed(close(origin, index.layers))}?"
            )
        if kind == WEIGHT:
            return RecipeError(f"{index.name} has no weights of {origin}.")
        return RecipeError(
            f"{index.name} has no {kind} of {origin}: take the weights alone from there (kinds: [weight]), or drop "
            f"the optimizer (optimizer: drop)."
        )

    # The whole ---------------------------------------------------------------------------

    def _check_states(self, slots: Mapping[str, Slot]) -> None:
        """Refuse a result in which the optimizer knows some layers and has never seen others."""
        asked = {take.source: take for take in self.recipe.takes}
        for name, index in self.indexes.items():
            used = [slot for slot in slots.values() if slot.source == name]
            if index.has_states or not used or self.recipe.optimizer not in (KEEP,):
                continue
            layers = {slot.unit.layer for slot in used}
            with_states = {slot.unit.layer for slot in slots.values() if slot.unit.kind != WEIGHT}
            bare = [layer for layer in self.place.fills if layer in layers - with_states]
            if bare and with_states:
                way = "(kinds: [weight])" if name in asked else "in the recipe"
                raise RecipeError(
                    f"{name} has no optimizer state for {bare[0]}, where other sources have it: take its weights "
                    f"alone {way}, or drop the optimizer (optimizer: drop)."
                )

    def _check_ties(self, slots: Mapping[str, Slot]) -> None:
        """Parameters that share storage cannot come from two places; whichever was loaded last would win."""
        for tie in self.base.ties:
            held = [slots[key] for key in tie if key in slots]
            for slot in held[1:]:
                if slot.source != held[0].source:
                    raise RecipeError(
                        f"{held[0].fqn} and {slot.fqn} share one storage, but come from {held[0].source} and "
                        f"{slot.source}; name both layers, {held[0].unit.layer} and {slot.unit.layer}, with one source."
                    )

    def _check_age(self, slots: Mapping[str, Slot], step: int | None) -> None:
        bound = self.recipe.max_stale_steps
        if bound is None:
            return
        for slot in slots.values():
            age = None if step is None or slot.held.step is None else step - slot.held.step
            if age is None:
                raise RecipeError(
                    f"{slot.source} does not tell the step of {slot.unit}, so max_stale_steps cannot be held; "
                    f"leave it out."
                )
            if age > bound:
                raise RecipeError(
                    f"{slot.unit} in {slot.source} is of step {slot.held.step}, {age} steps older than the result's "
                    f"{step}, and max_stale_steps is {bound}; take it from a newer checkpoint."
                )

    def _dropped(self, slots: Iterable[Slot]) -> frozenset[str]:
        there = {slot.fqn for slot in slots}
        return frozenset(held.fqn for held in self.base.tensors.values()) - there


def recipe_train(recipe: Recipe) -> str | None:
    """Return the source of what belongs to no layer, None for nothing."""
    return None if recipe.train == DROP else recipe.train or recipe.base


def _gives(take: Take, kind: str) -> bool:
    if take.kinds is None or kind in take.kinds:
        return True
    # Adam's step goes with the moments.
    return kind == STEP and any(other != WEIGHT for other in take.kinds)


def _inner(fqn: str, layer: str) -> str:
    return fqn[len(layer) :] if fqn.startswith(layer) else fqn


def _moved(held: Held, layer: str, other: str) -> Held:
    """Return a tensor of one layer as the alike one of another would be called."""
    return held if layer == other else Held(**{**vars(held), "fqn": other + _inner(held.fqn, layer), "layer": other})


def _shape(held: Held) -> tuple[int, ...]:
    return tuple(held.shape.size or ())


def _renamed(slots: Iterable[Slot]) -> dict[str, tuple[str, ...]]:
    """Return the parameters that are called otherwise in the result, or are there more than once."""
    names: dict[str, dict[str, None]] = {}
    for slot in slots:
        names.setdefault(slot.held.fqn, {})[slot.fqn] = None
    return {old: tuple(new) for old, new in names.items() if list(new) != [old]}


def _notes(slots: Iterable[Slot], base: Index) -> Iterable[str]:
    """Yield what should be known of dtypes: a mixture is loaded without a word."""
    dtypes: dict[object, str] = {}
    for slot in slots:
        if slot.unit.kind == WEIGHT and slot.held.shape.dtype is not None and slot.held.shape.dtype.is_floating_point:
            dtypes.setdefault(slot.held.shape.dtype, slot.source)
    if len(dtypes) > 1 and len({held.shape.dtype for held in base.tensors.values() if held.kind == WEIGHT}) == 1:
        words = " and ".join(f"{str(d).removeprefix('torch.')} from {name}" for d, name in dtypes.items())
        yield f"Weights are of several dtypes: {words}; they are kept as they are."
