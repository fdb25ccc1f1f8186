"""The index: which tensors a source of a merge holds, by key, parameter and layer. Pure data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tailor_dcp.catalog import MODEL, STATE, Catalog
from tailor_dcp.contents import Contents
from tailor_dcp.layers import LayerMap
from tailor_dcp.metadata.compose import Shape, shape_of
from tailor_dcp.units import WEIGHT

_GROUPS = re.compile(r"(?:.*\.)?param_groups\..*")
_NUMBERED = re.compile(r"(?:.*\.)?state\.\d+\.[^.]+")


@dataclass(frozen=True)
class Held:
    """A tensor of a source.

    Attributes:
        key: its key in the source's flattened state dict.
        fqn: the parameter's name.
        kind: ``weight`` or the optimizer state's name.
        layer: its layer's name.
        shape: its size and dtype.
        step: the step whose values it has; None where that is not known.
    """

    key: str
    fqn: str
    kind: str
    layer: str
    shape: Shape
    step: int | None


@dataclass(frozen=True)
class Index:
    """What a source holds.

    Attributes:
        name: the source as the recipe calls it.
        tensors: parameters, buffers and optimizer states by key, in the model's order.
        step: its training step, None if it has none.
        ties: keys that share one storage in training, in groups.
        groups: whether it has param groups.
        numbered: whether it has optimizer state that is kept under numbers, so that nothing tells whose it is.
        listed: parameters that param groups name, as far as that is known without reading.
    """

    name: str
    tensors: Mapping[str, Held]
    step: int | None = None
    ties: tuple[tuple[str, ...], ...] = ()
    groups: bool = False
    numbered: bool = False
    listed: frozenset[str] = frozenset()
    _by_name: dict[tuple[str, str], list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers' names, in the model's order."""
        return tuple(dict.fromkeys(held.layer for held in self.tensors.values()))

    @cached_property
    def by_layer(self) -> dict[str, dict[str, list[Held]]]:
        """The tensors of each layer and kind."""
        found: dict[str, dict[str, list[Held]]] = {}
        for held in self.tensors.values():
            found.setdefault(held.layer, {}).setdefault(held.kind, []).append(held)
        return found

    @cached_property
    def kinds(self) -> frozenset[str]:
        """All kinds that any layer has."""
        return frozenset(held.kind for held in self.tensors.values())

    @cached_property
    def fqns(self) -> frozenset[str]:
        """The names of all parameters and buffers."""
        return self.listed.union(held.fqn for held in self.tensors.values())

    @property
    def has_states(self) -> bool:
        """Whether there is any optimizer state."""
        return bool(self.kinds - {WEIGHT})

    def find(self, key: str, fqn: str, kind: str) -> Held | None:
        """Return a parameter's tensor of a kind: that of the key, or else the only one."""
        known = self.tensors.get(key)
        if known is not None and (known.fqn, known.kind) == (fqn, kind):
            return known
        if not self._by_name:
            for held in self.tensors.values():
                self._by_name.setdefault((held.fqn, held.kind), []).append(held.key)
        keys = self._by_name.get((fqn, kind), [])
        return self.tensors[keys[0]] if len(keys) == 1 else None


def index_of_contents(name: str, contents: Contents) -> Index:
    """Return the index of a DCP checkpoint."""
    stored = contents.base.metadata.state_dict_metadata
    steps = {key: held.origin.step for held in contents.units.values() for key in held.keys}
    own = contents.base.origin.step
    layers = LayerMap()
    tensors = {
        key: Held(
            key,
            entry.fqn,
            entry.unit.kind,
            contents.layer(key) or layers.layer(entry.fqn),
            shape_of(stored[key]),
            steps.get(key, own),
        )
        for key, entry in contents.entries.items()
    }
    record = contents.base.record
    others = stored.keys() - tensors.keys()
    return Index(
        name,
        tensors,
        own,
        record.ties if record else (),
        groups=any(map(_GROUPS.fullmatch, others)),
        numbered=any(map(_NUMBERED.fullmatch, others)),
    )


def index_of_catalog(name: str, catalog: Catalog) -> Index:
    """Return the index of what any other format holds."""
    told = catalog.train.get("step")
    step = told if isinstance(told, int) else None
    layers = LayerMap()

    def held(key: str, fqn: str, kind: str, shape: Shape) -> Held:
        return Held(key, fqn, kind, layers.layer(fqn), shape, step)

    tensors = {
        MODEL + fqn: held(MODEL + fqn, fqn, WEIGHT, Shape(t.size, t.dtype)) for fqn, t in catalog.weights.items()
    }
    for fqn, kinds in catalog.state.items():
        for kind, t in kinds.items():
            key = f"{STATE}{fqn}.{kind}"
            tensors[key] = held(key, fqn, kind, Shape(t.size, t.dtype))
    return Index(name, tensors, step, tuple(_tied(catalog)), groups=bool(catalog.groups), listed=_listed(catalog))


def _listed(catalog: Catalog) -> frozenset[str]:
    return frozenset(name for group in catalog.groups for name in group["params"])


def _tied(catalog: Catalog) -> Iterable[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for other, first in catalog.ties.items():
        groups.setdefault(first, [first]).append(other)
    return (tuple(MODEL + fqn for fqn in names) for names in groups.values())
