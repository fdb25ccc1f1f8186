"""The index: which tensors a source of a merge holds, by key, parameter and layer. Pure data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from tailor_dcp.catalog import MODEL, STATE, Catalog
from tailor_dcp.contents import Contents
from tailor_dcp.layers import LayerMap
from tailor_dcp.merging.param_groups import is_list
from tailor_dcp.metadata.compose import Shape, shape_of
from tailor_dcp.units import WEIGHT

_GROUPS = re.compile(r"(?:.*\.)?param_groups\..*")
_FLAT = re.compile(r"(?:.*\.)?param_groups\.(?!\d+\.)(?P<fqn>.+)\.[^.]+")
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
        lists: reads the parameters that param groups name.
    """

    name: str
    tensors: Mapping[str, Held]
    step: int | None = None
    ties: tuple[tuple[str, ...], ...] = ()
    groups: bool = False
    numbered: bool = False
    listed: frozenset[str] = frozenset()
    lists: Callable[[], frozenset[str]] = field(default=frozenset, repr=False, compare=False)
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

    def groups_know(self, fqn: str) -> bool:
        """Tell whether the param groups name a parameter. One that has state is in them; else their lists are read."""
        if self.listed:
            return fqn in self.listed
        if fqn in self._trained:
            return True
        names = self.lists()
        return fqn in (names or (self._trained or self.fqns))

    @cached_property
    def _trained(self) -> frozenset[str]:
        return frozenset(held.fqn for held in self.tensors.values() if held.kind != WEIGHT)

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


def index_of_contents(name: str, contents: Contents, read: Callable[[str], Any] | None = None) -> Index:
    """Return the index of a DCP checkpoint.

    Args:
        name: the source as the recipe calls it.
        contents: the checkpoint.
        read: reads an entry that is no tensor; asked for param groups' lists alone, should they be needed.
    """
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

    @cache
    def lists() -> frozenset[str]:
        held = [read(key) for key in sorted(others) if is_list(key)] if read else []
        return frozenset(one for names in held if isinstance(names, list) for one in names if isinstance(one, str))

    return Index(
        name,
        tensors,
        own,
        record.ties if record else _in_one_place(contents),
        groups=any(map(_GROUPS.fullmatch, others)),
        numbered=any(map(_NUMBERED.fullmatch, others)),
        listed=frozenset(found["fqn"] for found in map(_FLAT.fullmatch, others) if found),
        lists=lists,
    )


def _in_one_place(contents: Contents) -> tuple[tuple[str, ...], ...]:
    """Return the weights that are stored at one place, for checkpoints that remember no ties."""
    found: dict[tuple[object, ...], list[str]] = {}
    for key, entry in contents.entries.items():
        places = sorted((info.relative_path, info.offset) for _, info in contents.base.blobs.get(key, ()))
        if entry.unit.kind == WEIGHT and places:
            shape = shape_of(contents.base.metadata.state_dict_metadata[key])
            found.setdefault((shape, *places), []).append(key)
    return tuple(tuple(keys) for keys in found.values() if len(keys) > 1)


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
    return Index(
        name,
        tensors,
        step,
        tuple(_tied(catalog)),
        groups=bool(catalog.groups),
        numbered=bool(numbered_of(catalog)),
        listed=_listed(catalog),
    )


def numbered_of(catalog: Catalog) -> frozenset[str]:
    """Return what of a catalog's ``train`` is an optimizer whose state is kept under numbers."""
    return frozenset(key for key, value in catalog.train.items() if _is_numbered(value))


def progress_of(catalog: Catalog) -> dict[str, Any]:
    """Return what is left of a training without its optimizer."""
    gone = numbered_of(catalog)
    return {name: value for name, value in catalog.train.items() if name not in gone}


def _is_numbered(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    state = value.get("state")
    if isinstance(state, Mapping) and state and all(str(key).isdigit() for key in state):
        return True
    return any(map(_is_numbered, value.values()))


def _listed(catalog: Catalog) -> frozenset[str]:
    return frozenset(name for group in catalog.groups for name in group["params"] if isinstance(name, str))


def _tied(catalog: Catalog) -> Iterable[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for other, first in catalog.ties.items():
        groups.setdefault(first, [first]).append(other)
    return (tuple(MODEL + fqn for fqn in names) for names in groups.values())
