"""Selection: which units of a state are due, given what an earlier checkpoint holds. Pure arithmetic."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from tailor_dcp.errors import PolicyError
from tailor_dcp.layers import LayerMap
from tailor_dcp.metadata.compose import Shape
from tailor_dcp.metadata.record import Origin
from tailor_dcp.policies import Policy, SaveRequest, UnitInfo
from tailor_dcp.sketch import Samples
from tailor_dcp.units import STEP, WEIGHT, Unit

Units = Mapping[Unit, tuple[str, ...]]
"""The keys of the state dict that make up each unit, in the model's order."""


@dataclass(frozen=True)
class State:
    """What is being saved, over all ranks.

    Attributes:
        shapes: global size and dtype of every key, those that no unit owns included.
        units: the units and their keys.
        ties: groups of keys that share storage.
        trained: the keys of weights that have optimizer state.
        fingerprints: of every tensor; empty unless the policy needs them.
        changed: whether a unit's bits differ from what the base holds; None or left out if unknown.
        sketches: samples of every floating-point tensor; empty unless the policy needs drift.
        drift: how far a unit moved since what the base holds of it; left out if unknown.
    """

    shapes: Mapping[str, Shape]
    units: Units
    ties: tuple[tuple[str, ...], ...] = ()
    trained: frozenset[str] = frozenset()
    fingerprints: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[Unit, bool | None] = field(default_factory=dict)
    sketches: Mapping[str, Samples] = field(default_factory=dict)
    drift: Mapping[Unit, float] = field(default_factory=dict)

    @property
    def tied_units(self) -> list[set[Unit]]:
        """Units that are one because they share a parameter."""
        owner = {key: unit for unit, keys in self.units.items() for key in keys}
        return join({owner[key] for key in group if key in owner} for group in self.ties)


@dataclass(frozen=True)
class Holdings:
    """What an earlier checkpoint can give.

    Attributes:
        shapes: size and source dtype of the keys it holds.
        origins: the save that each key's bytes come from.
    """

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def origin(self, keys: Collection[str], state: State) -> Origin | None:
        """Return the one origin of all ``keys``, None if they changed or come from several saves."""
        found = {self.origins.get(key) for key in keys}
        if len(found) != 1 or any(self.shapes.get(key) != state.shapes[key] for key in keys):
            return None
        return found.pop()


def join(groups: Iterable[set[Unit]]) -> list[set[Unit]]:
    """Merge groups that have a member in common."""
    joined: list[set[Unit]] = []
    for group in groups:
        merged = set(group)
        for other in [g for g in joined if g & merged]:
            joined.remove(other)
            merged |= other
        joined.append(merged)
    return joined


def held(state: State, holdings: Holdings) -> dict[Unit, Origin]:
    """Return the units whose bytes an earlier checkpoint can give, and where they come from."""
    origins = {unit: holdings.origin(keys, state) for unit, keys in state.units.items()}
    return {unit: origin for unit, origin in origins.items() if origin is not None}


def ask(policy: Policy, request: SaveRequest, state: State, available: Collection[Unit], full: bool) -> set[Unit]:
    """Return the due units: what the policy selects, what cannot be carried, and what goes with those.

    Args:
        policy: decides upon ``request``.
        request: as ``make_request`` builds it.
        state: the state being saved.
        available: units that could be carried.
        full: write everything; the policy is not asked.

    Raises:
        PolicyError: the policy returned a unit that does not exist.
    """
    if full or not available:
        return set(state.units)
    chosen = {_checked(unit, state.units, policy) for unit in policy.select(request)}
    return complete(chosen | (state.units.keys() - available), state, available)


def complete(due: set[Unit], state: State, available: Collection[Unit]) -> set[Unit]:
    """Add what goes with the due units: tied parameters are one, and ``step`` goes with the moments."""
    moments = _moments_by_layer(state.units)
    due = set(due)
    for unit in state.units:
        if unit.kind == STEP and moments.get(unit.layer) and unit not in available:
            due |= moments[unit.layer]
    for group in state.tied_units:
        if group & due:
            due |= group
    for unit in state.units:
        if unit.kind == STEP and moments.get(unit.layer):
            (due.add if moments[unit.layer] & due else due.discard)(unit)
    return due


def make_request(
    state: State,
    available: Mapping[Unit, Origin],
    step: int | None,
    index: int,
    layers: LayerMap,
    policy: Policy | None = None,
    rate: float | None = None,
) -> SaveRequest:
    """Describe the state to a policy. Followers (``step``, tied twins) are not shown: they have no say."""
    followers = _followers(state)
    stored = narrower(state.units, state, policy) if policy else {}
    infos = []
    for unit, keys in state.units.items():
        if unit in followers:
            continue
        origin, place = available.get(unit), layers.position(unit.layer)
        infos.append(
            UnitInfo(
                layer=unit.layer,
                kind=unit.kind,
                bytes=sum(state.shapes[key].bytes for key in keys),
                saved_step=origin.step if origin else None,
                age=index - origin.nth if origin else None,
                stack=place[0] if place else None,
                number=place[1] if place else None,
                changed=state.changed.get(unit) if origin else None,
                stored=sum(state.shapes[key].stored_in(stored.get(key)) for key in keys),
                drift=state.drift.get(unit) if origin else None,
            )
        )
    return SaveRequest(step, index, tuple(infos), rate)


def narrower(due: Iterable[Unit], state: State, policy: Policy) -> dict[str, torch.dtype]:
    """Return the keys of due units that are stored in a narrower dtype than training's, and that dtype.

    Buffers and frozen weights keep their own where training is seen to go on beside them: a
    running mean or a frozen base in half precision could not be restored bit for bit.
    """
    stored: dict[str, torch.dtype] = {}
    for unit in due:
        if unit.kind == STEP:
            continue
        for key in state.units[unit]:
            dtype = state.shapes[key].dtype
            if dtype is None or not dtype.is_floating_point:
                continue
            if unit.kind == WEIGHT and state.trained and key not in state.trained:
                continue
            wanted = policy.storage_dtype(unit, dtype)
            if wanted != dtype:
                stored[key] = wanted
    return stored


def cohorts(policy: Policy, request: SaveRequest, state: State) -> dict[str, str]:
    """Label each key with the group of keys that live and die together on disk."""
    labels = dict(policy.cohorts(request))
    moments = _moments_by_layer(state.units)
    for group in state.tied_units:
        leader = next(unit for unit in state.units if unit in group)
        labels.update({unit: labels[leader] for unit in group if leader in labels})
    by_key = {}
    for unit, keys in state.units.items():
        leader = next(iter(sorted(moments.get(unit.layer, {unit}))), unit) if unit.kind == STEP else unit
        label = labels.get(leader, unit.layer)
        family = "weights" if unit.kind == WEIGHT else "moments"
        by_key.update(dict.fromkeys(keys, f"{family}/{label}"))
    return by_key


def _followers(state: State) -> set[Unit]:
    moments = _moments_by_layer(state.units)
    followers = {unit for unit in state.units if unit.kind == STEP and moments.get(unit.layer)}
    for group in state.tied_units:
        followers |= set([unit for unit in state.units if unit in group][1:])
    return followers


def _moments_by_layer(units: Iterable[Unit]) -> dict[str, set[Unit]]:
    moments: dict[str, set[Unit]] = {}
    for unit in units:
        if unit.kind not in (WEIGHT, STEP):
            moments.setdefault(unit.layer, set()).add(unit)
    return moments


def _checked(unit: object, units: Units, policy: Policy) -> Unit:
    if isinstance(unit, tuple) and len(unit) == 2 and unit in units:
        return Unit(*unit)
    named = "/".join(map(str, unit)) if isinstance(unit, tuple) else repr(unit)
    close = difflib.get_close_matches(named, [str(u) for u in units], n=1, cutoff=0.0)
    raise PolicyError(
        f"The policy {policy} returned the unit {named}, which this state does not have; "
        f"its units are (layer, kind) pairs such as {close[0] if close else 'none at all'}."
    )
