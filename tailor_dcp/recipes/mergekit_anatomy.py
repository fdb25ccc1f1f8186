"""A model's anatomy: its layers, and what lies before and after them, found from the names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tailor_dcp.layers import LayerMap
from tailor_dcp.names import listed
from tailor_dcp.recipes.errors import RecipeError

_INPUTS = ("wte", "wpe", "shared")
_INPUT_PARTS = ("embed", "embd")
_OUTPUTS = ("embed_out", "lm_head", "output")


@dataclass(frozen=True)
class Anatomy:
    """Where a model's tensors are.

    Attributes:
        model: the model, in messages.
        stack: the name of its layers without their number, ``model.layers``; None if it has none.
        layers: for each layer its tensors' names, by what follows the layer's own name.
        before: the names before the layers: of embeddings.
        after: the names after the layers: final norm, output embeddings and whatever else there is.
        stacks: all stacks of layers that the model may have.
        places: for each tensor of a stack its layer's number and how many layers there are.
    """

    model: str
    stack: str | None
    layers: tuple[Mapping[str, str], ...]
    before: Mapping[str, str]
    after: Mapping[str, str]
    stacks: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]

    @property
    def names(self) -> list[str]:
        """All names."""
        return [*self.before, *(name for held in self.layers for name in held.values()), *self.after]

    @property
    def only(self) -> str:
        """The one stack of layers.

        Raises:
            RecipeError: there is none, or there are several.
        """
        if self.stack is not None:
            return self.stack
        if not self.stacks:
            raise RecipeError(f"{self.model} has no numbered layers, so there are none to slice; list whole models.")
        raise RecipeError(
            f"{self.model} has several stacks of layers ({listed(self.stacks).replace(' or ', ' and ')}), and a slice "
            f"does not tell which is meant; list whole models, or write a recipe of layers."
        )


def anatomy(model: str, names: Iterable[str]) -> Anatomy:
    """Sort a model's tensors into layers and the rest."""
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    loose: list[str] = []
    layers = LayerMap()
    for name in names:
        layer = layers.layer(name)
        place = layers.position(layer)
        if place is None or not name.startswith(layer):
            loose.append(name)
        else:
            stacks.setdefault(place[0], {}).setdefault(place[1], {})[name[len(layer) :]] = name
    found = _stacks(stacks)
    chosen = found[0] if len(found) == 1 else None
    for stack, held in stacks.items():
        if stack != chosen:
            loose += [name for tensors in held.values() for name in tensors.values()]
    held = stacks[chosen] if chosen is not None else {}
    return Anatomy(
        model=model,
        stack=chosen,
        layers=tuple(held[number] for number in sorted(held)),
        before={name: name for name in loose if is_input(name)},
        after={name: name for name in loose if not is_input(name)},
        stacks=tuple(found),
        places={
            name: (number, len(stacks[stack]))
            for stack in found
            for number, tensors in stacks[stack].items()
            for name in tensors.values()
        },
    )


def _stacks(numbered: Mapping[str, Mapping[int, object]]) -> list[str]:
    """Return the numbered blocks that are stacks of layers: those of several, unless all have one.

    A block whose numbers have gaps, such as a head's ``classifier.0`` and ``classifier.2``, is none.
    """
    whole = {stack: len(held) for stack, held in numbered.items() if sorted(held) == list(range(len(held)))}
    several = [stack for stack, count in whole.items() if count > 1]
    return several or list(whole)


def is_input(name: str) -> bool:
    """Tell whether a tensor outside of the layers comes before them: embeddings do, other than of the output."""
    parts = name.split(".")
    if any(part in _OUTPUTS for part in parts):
        return False
    return any(part in _INPUTS or any(word in part for word in _INPUT_PARTS) for part in parts)
