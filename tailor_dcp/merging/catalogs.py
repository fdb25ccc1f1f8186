"""Merging by picking where a source is no DCP checkpoint, or the result none: a catalog made of catalogs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.merging.index import progress_of
from tailor_dcp.merging.param_groups import LISTS, renamed_list
from tailor_dcp.merging.resolve import Resolved, Slot
from tailor_dcp.tensors import Readable
from tailor_dcp.units import WEIGHT


@dataclass(frozen=True, eq=False)
class Repeated(Readable):
    """A tensor that is there once more: one of its own, which is not tied to the first."""

    inner: Readable

    @property
    def size(self) -> torch.Size:  # type: ignore[override]
        """Its shape."""
        return self.inner.size

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Its dtype."""
        return self.inner.dtype

    @property
    def source(self) -> Readable:
        """The tensor that is read."""
        return self.inner.source

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Read the first."""
        self.inner.read_into(out, start)


def catalog_of(resolved: Resolved, sources: Mapping[str, Catalog], base: str) -> Catalog:
    """Return what a recipe puts together.

    Args:
        resolved: where everything comes from.
        sources: the catalogs of the sources by name.
        base: the name of the recipe's base.
    """
    tensors = _Tensors(sources, resolved)
    weights: dict[str, Readable] = {}
    state: dict[str, dict[str, Readable]] = {}
    for slot in resolved.slots.values():
        if slot.unit.kind == WEIGHT:
            weights[slot.fqn] = tensors.take(slot)
        else:
            state.setdefault(slot.fqn, {})[slot.unit.kind] = tensors.take(slot)
    train = sources[resolved.train] if resolved.train else None
    groups = train.groups if train and resolved.optimizer else ()
    slots = resolved.slots.values()
    return replace(
        sources[base],
        weights=weights,
        state=state,
        groups=tuple(_group(group, resolved) for group in groups),
        train=_renamed(train.train if resolved.optimizer else progress_of(train), resolved) if train else {},
        buffers=frozenset(slot.fqn for slot in slots if slot.held.fqn in sources[slot.source].buffers),
        frozen=frozenset(slot.fqn for slot in slots if slot.held.fqn in sources[slot.source].frozen),
        notes=tuple(dict.fromkeys(note for catalog in sources.values() for note in catalog.notes)),
    )


def needed_of(resolved: Resolved, name: str, catalog: Catalog) -> Catalog:
    """Return of a source only what the result takes from it, by the source's own names."""
    fqns: dict[str, set[str]] = {}
    for slot in resolved.slots.values():
        if slot.source == name:
            fqns.setdefault(slot.unit.kind, set()).add(slot.held.fqn)
    state = {
        fqn: {kind: tensor for kind, tensor in kinds.items() if fqn in fqns.get(kind, ())}
        for fqn, kinds in catalog.state.items()
    }
    trained = resolved.train == name
    return replace(
        catalog,
        weights={fqn: tensor for fqn, tensor in catalog.weights.items() if fqn in fqns.get(WEIGHT, ())},
        state={fqn: kinds for fqn, kinds in state.items() if kinds},
        groups=catalog.groups if trained else (),
        train=catalog.train if trained else {},
        files={},
    )


class _Tensors:
    """Hands tensors out; the second time that one is asked for, a copy of its own, unless the two are tied."""

    def __init__(self, sources: Mapping[str, Catalog], resolved: Resolved) -> None:
        self._sources = sources
        self._leaders = {key: tie[0] for tie in resolved.ties for key in tie}
        self._copies: dict[int, dict[str, Readable]] = {}

    def take(self, slot: Slot) -> Readable:
        catalog, held = self._sources[slot.source], slot.held
        weight = held.kind == WEIGHT
        tensor = catalog.weights[held.fqn] if weight else catalog.state[held.fqn][held.kind]
        copies = self._copies.setdefault(id(tensor), {})
        leader = self._leaders.get(slot.key, slot.key)
        return copies.setdefault(leader, Repeated(tensor) if copies else tensor)


def _group(group: Mapping[str, Any], resolved: Resolved) -> dict[str, Any]:
    held = {key: list(group[key]) for key in LISTS if isinstance(group.get(key), list | tuple)}
    return {**group, **{key: renamed_list(names, resolved.renamed, resolved.dropped) for key, names in held.items()}}


def _renamed(train: Mapping[str, Any], resolved: Resolved) -> dict[str, Any]:
    """Return the training's progress; what DeepSpeed remembers there of parameters has their names."""
    zero = train.get("zero")
    if not resolved.renames or not isinstance(zero, Mapping):
        return dict(train)
    lists = {
        key: renamed_list(list(value), resolved.renamed, resolved.dropped)
        for key, value in zero.items()
        if key in ("buffers", "frozen") and value
    }
    return {**train, "zero": {**zero, **lists}}
