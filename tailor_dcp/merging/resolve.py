"""Resolving: a recipe and the indexes of its sources give, for each tensor of the result, where it comes from.

Everything that can be wrong with a recipe is found here, before anything is written. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tailor_dcp.layers import LayerMap
from tailor_dcp.merging import checks, tying
from tailor_dcp.merging.index import Held, Index
from tailor_dcp.merging.naming import renamed_text
from tailor_dcp.merging.placing import Placing, named_by, placed
from tailor_dcp.names import close, listed
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.native import AVERAGE, DROP, KEEP, Recipe, Take
from tailor_dcp.ties import Tie
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
        like: what its key was made after: what the base has of that name or of a like layer, else ``held``.
        like_source: the source that this is in.
    """

    key: str
    fqn: str
    unit: Unit
    source: str
    held: Held
    like: Held
    like_source: str


@dataclass(frozen=True)
class Resolved:
    """Where everything in the result comes from.

    Attributes:
        slots: each parameter, buffer and optimizer state of the result, in its order.
        train: the source of what belongs to no layer; None for nothing.
        renamed: for each parameter that lists of names in ``train`` know and that has another name, or more than
            one, in the result: these.
        dropped: the parameters that such lists know and that are not in the result.
        optimizer: whether the result has an optimizer.
        step: the result's training step.
        layers: for each layer of the result, the one that fills it as its source calls it.
        notes: what the user should know.
        ties: keys of the result that share one storage.
        loose: what shares one storage in the base, and does not in the source that it comes from, as far as that
            tells.
    """

    slots: Mapping[str, Slot]
    train: str | None
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    optimizer: bool = True
    step: int | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ties: tuple[Tie, ...] = ()
    loose: tuple[tuple[Slot, Slot], ...] = ()

    @property
    def renames(self) -> bool:
        """Whether names of parameters differ from those in ``train``."""
        return bool(self.renamed or self.dropped)


def sources_of(recipe: Recipe) -> list[str]:
    """Return the names of all sources of a recipe, the base first."""
    named = [recipe.base, *(take.source for take in recipe.takes)]
    named += [name for name in (recipe.train,) if name not in (None, DROP)]
    named += [recipe.optimizer] if recipe.optimizer not in (KEEP, DROP, AVERAGE) else []
    return list(dict.fromkeys(named))


def of_weights(recipe: Recipe) -> Recipe:
    """Return what a recipe says of weights alone, for results that hold no optimizer."""
    takes = tuple(replace(take, kinds=None) for take in recipe.takes if _gives(take, WEIGHT))
    return replace(recipe, takes=takes, optimizer=DROP)


def resolve(recipe: Recipe, indexes: Mapping[str, Index]) -> Resolved:
    """Find where each tensor of the result comes from.

    Args:
        recipe: what to put together.
        indexes: what each of ``sources_of(recipe)`` holds.

    Raises:
        RecipeError: the recipe asks for what there is not, or contradicts itself.
    """
    checks.optimizer(recipe, indexes)
    return _Resolver(recipe, indexes).resolved()


class _Resolver:
    def __init__(self, recipe: Recipe, indexes: Mapping[str, Index]) -> None:
        self.recipe, self.indexes = recipe, indexes
        self.base = indexes[recipe.base]
        self.place: Placing = placed(recipe, self.base, indexes)
        self._of_layer: dict[str, list[tuple[str, Take]]] = {}

    def resolved(self) -> Resolved:
        self._check_kinds()
        slots: dict[str, Slot] = {}
        for layer, origin in self.place.fills.items():
            for slot in self._layer(layer, origin):
                if slot.key in slots:
                    raise RecipeError(
                        f"{slot.fqn} of {slot.source} would have the key {slot.key}, as another tensor has; take this "
                        f"layer from a checkpoint that is laid out as {self.base.name} is."
                    )
                slots[slot.key] = slot
        kept = recipe_train(self.recipe)
        trained = self.indexes[kept] if kept else self.base
        step = trained.step
        found = list(slots.values())
        checks.states(self.recipe, self.indexes, found, self.place.fills)
        checks.groups(self.indexes, trained if kept else None, found)
        ties = tying.shared(self.base, self.indexes.values(), found)
        loose = tuple(tying.loose(self.base, ties, slots))
        checks.ages(self.recipe, found, step)
        renamed, dropped = _followed(found, trained, self.base)
        # An optimizer without state, as SGD's, has its param groups all the same.
        optimizer = any(slot.unit.kind != WEIGHT for slot in found) or not trained.has_states
        return Resolved(
            slots,
            kept,
            renamed,
            dropped,
            self.recipe.optimizer != DROP and optimizer,
            step,
            self.place.fills,
            tuple(_notes(found, self.base)),
            ties,
            loose,
        )

    # One layer of the result -------------------------------------------------------------

    def _layer(self, layer: str, origin: str) -> Iterable[Slot]:
        """Yield what a layer of the result consists of."""
        for kind in (WEIGHT, *self._kinds(layer, origin)):
            yield from self._tensors(layer, origin, kind, self.indexes[self._source_of(layer, kind)])

    def _kinds(self, layer: str, origin: str) -> list[str]:
        """Return the optimizer states that the layer has in any of the sources that it may be taken from."""
        if self.recipe.optimizer == DROP:
            return []
        if self.recipe.optimizer != KEEP:
            named = [self.recipe.optimizer]
        else:
            named = [*(take.source for _, take in self._takes(layer)), self.recipe.base]
        kinds = dict.fromkeys(kind for name in named for kind in self.indexes[name].by_layer.get(origin, {}))
        wanted = self.base.by_layer.get(self._model_layer(layer, origin) or "", {})
        return [kind for kind in kinds | dict.fromkeys(wanted) if kind != WEIGHT]

    def _takes(self, layer: str) -> list[tuple[str, Take]]:
        """Return the takes that mean a layer, each with the name that it means: the layer's, or a whole block's."""
        if layer not in self._of_layer:
            named = ((named_by(layer, take.layers), take) for take in self.recipe.takes)
            self._of_layer[layer] = [(name, take) for name, take in named if name is not None]
        return self._of_layer[layer]

    def _source_of(self, layer: str, kind: str) -> str:
        """Return the source of a unit of the result."""
        if kind != WEIGHT and self.recipe.optimizer not in (KEEP, DROP):
            return self.recipe.optimizer
        given = [(name, take) for name, take in self._takes(layer) if _gives(take, kind)]
        nearest = max((name for name, _ in given), key=len, default=layer)
        takes = [take for name, take in given if name == nearest]
        exact = [take for take in takes if take.layers == nearest] or takes
        told = [take for take in exact if kind == STEP and STEP in (take.kinds or ())] or exact
        named = list(dict.fromkeys(take.source for take in told))
        if len(named) > 1:
            way = f"name {STEP} among its kinds too" if kind == STEP else "name the layer itself to say which"
            raise RecipeError(
                f"{self.recipe.name} takes the {kind} of {layer} from {listed(named).replace(' or ', ' and ')}; {way}."
            )
        return named[0] if named else self.recipe.base

    def _tensors(self, layer: str, origin: str, kind: str, index: Index) -> Iterable[Slot]:
        """Yield one kind of a layer of the result; everything that the base has there must be in the source."""
        found = index.by_layer.get(origin, {}).get(kind, [])
        wanted = self._wanted(layer, origin, kind, index)
        if not found:
            # Weights and moments are kept apart by some: a checkpoint of an optimizer alone has no weights.
            if wanted or (origin not in index.by_layer and (kind != WEIGHT or WEIGHT in index.kinds)):
                raise self._missing(layer, origin, kind, index)
            return
        slots = [self._slot(layer, origin, held, index) for held in found]
        have = {slot.key for slot in slots}
        for key, held in wanted.items():
            if key not in have:
                raise RecipeError(
                    f"{index.name} has no {kind} of {held.fqn}, which {layer} has in {self.base.name} (as {held.key})."
                )
        for slot in slots:
            model, held = wanted.get(slot.key), slot.held
            if model is None and (wanted or self._is_strange(kind)):
                raise RecipeError(f"{index.name} has {kind} of {held.fqn}, which {self.base.name} has not.")
            if model is not None and model.shape.size != held.shape.size:
                raise RecipeError(
                    f"{held.fqn} ({kind}) in {index.name} has the shape {_shape(held)}, and {model.fqn} in "
                    f"{self.base.name} has {_shape(model)}; only layers of one shape can be put together."
                )
            yield slot

    def _slot(self, layer: str, origin: str, held: Held, index: Index) -> Slot:
        fqn = _moved(held.fqn, origin, layer)
        like = self.base.find(held.key, held.fqn, held.kind) or self._of_like_layer(held)
        key = renamed_text((like or held).key, like or held, fqn, layer)
        if key is None:
            raise RecipeError(
                f"{(like or held).key} does not have the name of its layer in it, so {held.fqn} cannot become {fqn}."
            )
        source = self.base.name if like else index.name
        return Slot(key, fqn, Unit(layer, held.kind), index.name, held, like or held, source)

    def _of_like_layer(self, held: Held) -> Held | None:
        """Return the like tensor of another layer of its stack in the base, which shows how keys are made there."""
        place = LayerMap.position(held.layer)
        for layer in self.base.layers:
            other = LayerMap.position(layer)
            if place and other and other[0] == place[0]:
                fqn = _moved(held.fqn, held.layer, layer)
                key = renamed_text(held.key, held, fqn, layer) or ""
                if found := self.base.find(key, fqn, held.kind):
                    return found
        return None

    def _wanted(self, layer: str, origin: str, kind: str, index: Index) -> dict[str, Held]:
        """Return what the base has where a unit goes, by its key in the result: the source must have just that."""
        if kind != WEIGHT and not self.base.has_states and index.has_states:
            return {}
        name = self._model_layer(layer, origin)
        if name is None:
            return {}
        held = self.base.by_layer[name].get(kind, [])
        return {renamed_text(one.key, one, _moved(one.fqn, name, layer), layer) or one.key: one for one in held}

    def _model_layer(self, layer: str, origin: str) -> str | None:
        """Return the layer of the base that tells what a layer of the result has to be like.

        The layer of its own name; but where a stack gets longer or shorter, so that it is another model's, the one
        that its filling has there.
        """
        place = LayerMap.position(layer)
        names = (origin, layer) if place and place[0] in self.place.resized else (layer, origin)
        return next((name for name in names if name in self.base.by_layer), None)

    def _is_strange(self, kind: str) -> bool:
        """Tell whether the base's optimizer has no state of a kind anywhere."""
        return kind != WEIGHT and self.base.has_states and kind not in self.base.kinds

    def _missing(self, layer: str, origin: str, kind: str, index: Index) -> RecipeError:
        if origin not in index.by_layer:
            return RecipeError(
                f"{index.name} has no layer {origin}, which {layer} shall be filled with ({kind}); did you mean "
                f"{listed(close(origin, index.layers))}?"
            )
        if kind == WEIGHT:
            return RecipeError(f"{index.name} has no weights of {origin}.")
        if self.recipe.optimizer != KEEP or index is self.base:
            way = "or drop the optimizer (optimizer: drop)"
        else:
            way = "take the weights alone from there (kinds: [weight]), or drop the optimizer (optimizer: drop)"
        return RecipeError(f"{index.name} has no {kind} of {origin}: {way.removeprefix('or ')}.")

    def _check_kinds(self) -> None:
        """Refuse kinds that no layer has where they are asked for."""
        for take in self.recipe.takes:
            index = self.indexes[take.source]
            there = {
                kind
                for layer, origin in self.place.fills.items()
                if named_by(layer, take.layers) is not None
                for kind in index.by_layer.get(origin, {})
            }
            for kind in take.kinds or ():
                if kind not in there:
                    have = f"has {listed(sorted(there)).replace(' or ', ' and ')} there" if there else "lacks the layer"
                    raise RecipeError(f"{take.source} has no {kind} of {take.layers}, which is asked for; it {have}.")


def recipe_train(recipe: Recipe) -> str | None:
    """Return the source of what belongs to no layer, None for nothing."""
    return None if recipe.train == DROP else recipe.train or recipe.base


def _gives(take: Take, kind: str) -> bool:
    if take.kinds is None or kind in take.kinds:
        return True
    # Adam's step goes with the moments.
    return kind == STEP and any(other != WEIGHT for other in take.kinds)


def _moved(fqn: str, layer: str, other: str) -> str:
    """Return a parameter of one layer as the like one of another is called."""
    return other + fqn[len(layer) :] if layer != other and fqn.startswith(layer) else fqn


def _shape(held: Held) -> tuple[int, ...]:
    return tuple(held.shape.size or ())


def _followed(slots: Iterable[Slot], trained: Index, base: Index) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """Return what becomes of names in lists: those that are others or several in the result, and those that go."""
    names: dict[str, dict[str, None]] = {}
    for slot in slots:
        old = slot.held.fqn if slot.held.fqn in trained.fqns else slot.fqn
        names.setdefault(old, {})[slot.fqn] = None
    renamed = {old: tuple(new) for old, new in names.items() if list(new) != [old]}
    return renamed, (trained.fqns | base.fqns) - names.keys()


def _notes(slots: Iterable[Slot], base: Index) -> Iterable[str]:
    """Yield what should be known of dtypes: a mixture is loaded without a word."""
    dtypes: dict[object, str] = {}
    for slot in slots:
        if slot.unit.kind == WEIGHT and slot.held.shape.dtype is not None and slot.held.shape.dtype.is_floating_point:
            dtypes.setdefault(slot.held.shape.dtype, slot.source)
    if len(dtypes) > 1 and len({held.shape.dtype for held in base.tensors.values() if held.kind == WEIGHT}) == 1:
        words = " and ".join(f"{str(d).removeprefix('torch.')} from {name}" for d, name in dtypes.items())
        yield f"Weights are of several dtypes: {words}; they are kept as they are."
