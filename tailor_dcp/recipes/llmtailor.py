"""LLMTailor's plans: mergekit's passthrough plans over training checkpoints, with more to say about what is no layer.

A plan chooses the layers outside of the numbered ones twice: their weights by ``pre_weights`` and ``post_weights``,
their optimizer state by slices of no length (``numbering`` has their numbers). Here weights and moments of a layer
always come together, so both choices must be the same.

LLMTailor (Sun et al., PDSW 2025) takes scheduler, generators and progress from the checkpoint of the highest step; so
do we. ``dtype`` and ``out_dtype`` are about the copies in 16 bits that it writes beside the masters. Masters are kept
as they are, and a ZeRO checkpoint has the dtype that its engine computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tailor_dcp.layers import LayerMap
from tailor_dcp.location import locate
from tailor_dcp.merging.index import Index
from tailor_dcp.names import close, listed
from tailor_dcp.recipes.documents import Document
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.recipes.llmtailor_file import Plan, Slice, Weight, is_plan, read_plan  # noqa: F401 - asked here
from tailor_dcp.recipes.native import Recipe, Take
from tailor_dcp.recipes.numbering import Numbering, numbering_of
from tailor_dcp.units import WEIGHT


def translate(document: Document, sources: Callable[[str], Index]) -> Recipe:
    """Return the native recipe that does what a plan says.

    The base is the plan's ``base_model``, else the checkpoint of the highest step that holds the whole model. What
    belongs to no layer comes from the checkpoint of the highest step in both cases.

    Args:
        document: the plan.
        sources: returns what the checkpoint of a path holds.

    Raises:
        RecipeError: the plan makes no sense, contradicts itself, or does not give each layer exactly once.
        TailorError: whatever opening a source says.
    """
    plan = read_plan(document)
    models = dict.fromkeys([s.model for s in plan.slices] + [w.model for w in plan.weights])
    indexes = {model: sources(model) for model in models}
    translation = _Translation(document, plan, indexes)
    chosen = translation.chosen()
    newest = _newest(indexes)
    base = plan.base_model or _newest(translation.whole()) or newest
    if base is None:
        raise RecipeError(
            f"{document.name}: none of its checkpoints tells its step, so nothing says which of them the training's "
            f"progress comes from; name paths that end in checkpoint-<step>, or a base_model."
        )
    return Recipe(
        base=base,
        takes=tuple(Take(layer, model) for layer, model in chosen.items() if model != base),
        train=None if newest == base else newest,
        name=document.name,
        text=document.text,
    )


def _newest(indexes: Mapping[str, Index]) -> str | None:
    """Return the checkpoint of the highest step, as its path tells it, or else its content."""
    told = {model: index.step if (step := locate(model).step) is None else step for model, index in indexes.items()}
    steps = {model: step for model, step in told.items() if step is not None}
    return max(steps, key=lambda model: steps[model]) if steps else None


class _Translation:
    def __init__(self, document: Document, plan: Plan, indexes: Mapping[str, Index]) -> None:
        self.document, self.plan, self.indexes = document, plan, indexes
        self.numbering: Numbering = numbering_of(list(indexes.values()), document.name)

    def chosen(self) -> dict[str, str]:
        """Return the checkpoint of each layer."""
        found = self._layers([held for held in self.plan.slices if not held.empty])
        weights = self._weights()
        groups = self._groups([held for held in self.plan.slices if held.empty])
        for number, layers in self.numbering.auxiliary.items():
            model = self._agreed(number, weights.get(number), groups.get(number))
            found |= dict.fromkeys(layers, model)
        return found | self._others(weights)

    def whole(self) -> dict[str, Index]:
        """Return the checkpoints that hold all units; those of StreamCheck hold some."""
        needed = {layer for layers in self.numbering.units.values() for layer in layers}
        return {model: index for model, index in self.indexes.items() if needed <= {*index.layers}}

    # The numbered layers -----------------------------------------------------------------

    def _layers(self, slices: Sequence[Slice]) -> dict[str, str]:
        stack, count = self.numbering.stack, self.numbering.count
        found: dict[str, str] = {}
        before: Slice | None = None
        for held in slices:
            words = f"layer_range [{held.start}, {held.stop}]"
            if held.stop > count:
                raise self.document.error(
                    held.place, f"{words} goes beyond the {count} layers of {stack}, which are counted from 0."
                )
            if held.start != len(found):
                after = f"follows {self._words(before)}" if before else "is the first one"
                raise self.document.error(held.place, f"{words} {after}, so that {self._gap(len(found), held.start)}.")
            found |= {self.numbering.layer(n): held.model for n in range(held.start, held.stop)}
            before = held
        if len(found) < count:
            raise RecipeError(
                f"{self.document.name} has slices of {len(found)} layers, and {stack} has {count}: "
                f"{self.numbering.layer(len(found))} comes from nowhere; add a slice up to [{len(found)}, {count}]."
            )
        return found

    def _gap(self, expected: int, start: int) -> str:
        if start < expected:
            return f"{self.numbering.layer(start)} would come twice; layers follow each other, each one once"
        return f"{self.numbering.layer(expected)} comes from nowhere; layers follow each other, each one once"

    def _words(self, held: Slice) -> str:
        line = self.document.line(held.place)
        return f"[{held.start}, {held.stop}]" + (f" (line {line})" if line else "")

    # The others, of which there are two halves --------------------------------------------

    def _groups(self, slices: Iterable[Slice]) -> dict[int, Slice]:
        """Return the slices of no length by the unit whose optimizer groups they mean."""
        found: dict[int, Slice] = {}
        for held in slices:
            if held.start not in self.numbering.auxiliary:
                raise self.document.error(
                    held.place, f"layer_range [{held.start}, {held.stop}] means nothing: {self.numbering.words}."
                )
            if held.start in found:
                raise self.document.error(
                    held.place,
                    f"layer_range {self._words(found[held.start])} is there twice; leave one of the two.",
                )
            found[held.start] = held
        return found

    def _weights(self) -> dict[int | str, Weight]:
        """Return the named weights by unit, or by layer for one that has no number."""
        found: dict[int | str, Weight] = {}
        names: dict[str, Weight] = {}
        for held in self.plan.weights:
            layer = self._layer_of(held)
            if held.name in names:
                raise self.document.error(
                    held.place,
                    f"{held.name} is named twice, before{self._line(names[held.name])}; leave one of the two.",
                )
            names[held.name] = held
            number = self.numbering.number(layer)
            first = found.setdefault(layer if number is None else number, held)
            if first.model != held.model:
                raise self.document.error(
                    held.place,
                    f"{held.name} comes from {held.model} and {first.name}{self._line(first)} from {first.model}, but "
                    f"they {'are one tensor' if self.numbering.tied and number else 'belong together'}; name one "
                    f"checkpoint for both.",
                )
        return found

    def _layer_of(self, held: Weight) -> str:
        layers = {t.fqn: t.layer for i in self.indexes.values() for t in i.tensors.values() if t.kind == WEIGHT}
        layer = layers.get(held.name)
        if layer is None:
            near = listed(close(held.name, [fqn for fqn, of in layers.items() if LayerMap.position(of) is None]))
            raise self.document.error(held.place, f"no checkpoint has a weight {held.name}; did you mean {near}?")
        if LayerMap.position(layer) is not None:
            raise self.document.error(
                held.place,
                f"{held.name} belongs to {layer}, which comes by its slice; {held.place[0]} is for what is outside of "
                f"the layers.",
            )
        return layer

    def _agreed(self, number: int, weight: Weight | None, group: Slice | None) -> str:
        """Return where a unit comes from, if both halves of the plan say the same."""
        layers = self.numbering.auxiliary[number]
        what, span = " with ".join(layers), f"[{number}, {number}]"
        if weight is None and group is None:
            raise RecipeError(
                f"{self.document.name} says nothing of {what}: name its weight in post_weights, and add a slice with "
                f"layer_range {span} for its optimizer state, both with one checkpoint."
            )
        if weight is None and group is not None:
            raise self.document.error(
                group.place,
                f"layer_range {span} moves the optimizer state of {what} and nothing its weights; name "
                f"{self._weight_of(layers[0])} with {group.model} in post_weights, too.",
            )
        if weight is not None and group is None:
            raise self.document.error(
                weight.place,
                f"{weight.place[0]} moves the weights of {what} and nothing its optimizer state; add a slice of "
                f"{weight.model} with layer_range {span}, too.",
            )
        assert weight is not None and group is not None
        if weight.model != group.model:
            raise self.document.error(
                weight.place,
                f"{weight.place[0]} takes {weight.name} from {weight.model}, but its optimizer state comes from "
                f"{group.model} by {self._words(group)}; name one checkpoint in both places.",
            )
        return weight.model

    def _weight_of(self, layer: str) -> str:
        held = (t.fqn for i in self.indexes.values() for t in i.by_layer.get(layer, {}).get(WEIGHT, ()))
        return next(held, f"{layer}.weight")

    def _others(self, weights: Mapping[int | str, Weight]) -> dict[str, str]:
        """Return the layers that have no number. Buffers may be left to the base; what is trained may not."""
        found: dict[str, str] = {}
        for layer, trained in self.numbering.others.items():
            weight = weights.get(layer)
            if weight is not None:
                found[layer] = weight.model
            elif trained:
                raise RecipeError(
                    f"{self.document.name} says nothing of {layer}; name {self._weight_of(layer)} in pre_weights, by "
                    f"which its optimizer state comes as well."
                )
        return found

    def _line(self, held: Weight) -> str:
        line = self.document.line(held.place)
        return f" (line {line})" if line else ""
