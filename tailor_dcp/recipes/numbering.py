"""How LLMTailor and StreamCheck count a model's units: 0 is the final norm, then come the layers, then the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tailor_dcp.layers import LayerMap
from tailor_dcp.merging.index import Index
from tailor_dcp.recipes.errors import RecipeError
from tailor_dcp.units import WEIGHT

NORM = "norm"
HEAD = "lm_head"
EMBED = "embed_tokens"
# The output embeddings first: gpt-neox calls them embed_out.
_ROLES = (
    (HEAD, re.compile(r"lm_head|embed_out|output")),
    (NORM, re.compile(r"norm|ln_f")),
    (EMBED, re.compile(r"embed|wte")),
)


@dataclass(frozen=True)
class Numbering:
    """The numbers of a model's units.

    Attributes:
        stack: the name that the numbered layers have in common.
        count: how many they are, called L.
        norm: the final norm's layer, number 0.
        head: the output embeddings' layer, number L+1.
        embed: the input embeddings' layer, number L+2.
        others: the layers outside of the stack that have none, and whether the optimizer knows them.
        tied: whether both embeddings are one tensor, which then has the number L+1.
    """

    stack: str
    count: int
    norm: str
    head: str
    embed: str
    others: Mapping[str, bool]
    tied: bool

    @property
    def auxiliary(self) -> dict[int, tuple[str, ...]]:
        """The numbered layers outside of the stack; both names of tied embeddings have one number."""
        if self.tied:
            return {0: (self.norm,), self.count + 1: (self.embed, self.head)}
        return {0: (self.norm,), self.count + 1: (self.head,), self.count + 2: (self.embed,)}

    @property
    def units(self) -> dict[int, tuple[str, ...]]:
        """All units by number, with their layers."""
        return {**{n + 1: (self.layer(n),) for n in range(self.count)}, **self.auxiliary}

    @property
    def words(self) -> str:
        """What the numbers outside of the stack mean in zero-length slices, for messages."""
        named = [f"[{n}, {n}] is {' with '.join(layers)}" for n, layers in self.auxiliary.items()]
        return f"with {self.count} layers {', '.join(named[:-1])} and {named[-1]}"

    def layer(self, number: int) -> str:
        """Return the name of a layer of the stack, counted from 0."""
        return f"{self.stack}.{number}"

    def number(self, layer: str) -> int | None:
        """Return the number of a layer outside of the stack, None if it has none."""
        return next((n for n, layers in self.auxiliary.items() if layer in layers), None)


def numbering_of(indexes: Sequence[Index], name: str) -> Numbering:
    """Return the numbers that a model's units have.

    Args:
        indexes: what checkpoints of the model hold; none of them need hold all of it.
        name: what asks for it, for messages.

    Raises:
        RecipeError: it is a model that cannot be counted like that.
    """
    layers = list(dict.fromkeys(layer for index in indexes for layer in index.layers))
    places = [place for layer in layers if (place := LayerMap.position(layer))]
    stacks = list(dict.fromkeys(stack for stack, _ in places))
    if len(stacks) != 1:
        what = f"several stacks of layers ({', '.join(stacks)})" if stacks else "no numbered layers"
        raise RecipeError(f"{name} counts the layers of one stack, and the model has {what}; write a native recipe.")
    outside = [layer for layer in layers if LayerMap.position(layer) is None]
    roles: dict[str, str] = {}
    for layer in outside:
        role = _role(layer)
        if role is not None and roles.setdefault(role, layer) != layer:
            raise RecipeError(
                f"{name} has one number for the model's {role}, which may be {roles[role]} or {layer}; write a native "
                f"recipe."
            )
    for role, _ in _ROLES:
        if role not in roles:
            raise RecipeError(
                f"{name} counts {role} as a unit, and none of its sources has one; write a native recipe."
            )
    return Numbering(
        stack=stacks[0],
        count=1 + max(number for _, number in places),
        norm=roles[NORM],
        head=roles[HEAD],
        embed=roles[EMBED],
        others={layer: _trained(layer, indexes) for layer in outside if layer not in roles.values()},
        tied=_tied(roles, indexes),
    )


def _role(layer: str) -> str | None:
    last = layer.rpartition(".")[2].lower()
    return next((role for role, pattern in _ROLES if pattern.search(last)), None)


def _trained(layer: str, indexes: Iterable[Index]) -> bool:
    return any(kind != WEIGHT for index in indexes for kind in index.by_layer.get(layer, ()))


def _tied(roles: Mapping[str, str], indexes: Iterable[Index]) -> bool:
    both = {roles[HEAD], roles[EMBED]}
    return any(both <= {i.tensors[key].layer for key in tie if key in i.tensors} for i in indexes for tie in i.ties)
