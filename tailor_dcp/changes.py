"""What changed since it was last saved: the ranks' fingerprints, put together and compared with a base's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from tailor_dcp.base import Base
from tailor_dcp.fingerprint import combine, fingerprint
from tailor_dcp.metadata.compose import shape_of
from tailor_dcp.policies import Policy
from tailor_dcp.policies.unchanged import UNTRAINED
from tailor_dcp.selection import State, Units
from tailor_dcp.units import STEP, WEIGHT, Unit

Part = tuple[str, tuple[int, ...]]
"""A key and where a chunk of it starts: what several ranks hold alike has one name and counts once."""
Parts = Mapping[Part, int]


def measure(plan: SavePlan, lookup: Callable[[MetadataIndex], object]) -> dict[Part, int]:
    """Return the fingerprints of a rank's chunks.

    Args:
        plan: the rank's items, before any is dropped.
        lookup: gives the tensor of an item.
    """
    parts: dict[Part, int] = {}
    for item in plan.items:
        data = item.tensor_data
        if data is None:
            continue
        tensor = lookup(item.index)
        # A stager may have left a placeholder for what it knows to be carried.
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.shape == data.chunk.sizes:
            where = tuple(data.chunk.offsets)
            parts[item.index.fqn, where] = fingerprint(tensor, where, data.size)
    return parts


def compare(state: State, ranks: Iterable[Parts], base: Base | None, policy: Policy) -> State:
    """Return the state with its fingerprints and what they tell, if the policy asks for that.

    Weights without optimizer state then are units of their own where their layer has others too:
    a LoRA base could not be told from its adapters otherwise.
    """
    if not policy.needs_fingerprints:
        return state
    state = replace(state, units=_split(state), fingerprints=_merged(ranks))
    return replace(state, changed=_changed(state, base, policy)) if base and base.record else state


def remembered(state: State, carried: Iterable[Unit], base: Base | None) -> dict[str, int]:
    """Return the fingerprints to keep: of the values that are written, and for what is carried, those it had."""
    old = base.record.fingerprints if base and base.record else {}
    kept = {key for unit in carried for key in state.units[unit]}
    known = {key for keys in state.units.values() for key in keys}
    new = {key: value for key, value in state.fingerprints.items() if key in known and key not in kept}
    return new | {key: old[key] for key in kept if key in old}


def _merged(ranks: Iterable[Parts]) -> dict[str, int]:
    """Add up each key's chunks. A key of which ranks hold different copies has no fingerprint: any may be written."""
    parts: dict[Part, int] = {}
    torn: set[str] = set()
    for rank in ranks:
        for part, value in rank.items():
            if parts.setdefault(part, value) != value:
                torn.add(part[0])
    values: dict[str, list[int]] = {}
    for (key, _), value in parts.items():
        values.setdefault(key, []).append(value)
    return {key: combine(several) for key, several in values.items() if key not in torn}


def _split(state: State) -> Units:
    units: dict[Unit, tuple[str, ...]] = {}
    for unit, keys in state.units.items():
        own = tuple(key for key in keys if key in state.trained)
        rest = tuple(key for key in keys if key not in state.trained)
        if unit.kind == WEIGHT and own and rest:
            units[unit] = own
            units[Unit(unit.layer + UNTRAINED, WEIGHT)] = rest
        else:
            units[unit] = keys
    return units


def _changed(state: State, base: Base, policy: Policy) -> dict[Unit, bool | None]:
    """Say of each unit whether its bits differ from what the base holds of it; None where nobody knows."""
    changed = {
        unit: _worst(_key_changed(key, unit, state, base, policy) for key in keys) for unit, keys in state.units.items()
    }
    # What is due together must be told together: policies see only one of several tied units, and no steps.
    for unit, own in changed.items():
        step = Unit(unit.layer, STEP)
        if unit.kind not in (WEIGHT, STEP) and step in changed:
            changed[unit] = _worst((own, changed[step]))
    for group in state.tied_units:
        changed.update(dict.fromkeys(group, _worst(changed[unit] for unit in group)))
    return changed


def _key_changed(key: str, unit: Unit, state: State, base: Base, policy: Policy) -> bool | None:
    record, dtype = base.record, state.shapes[key].dtype
    if record is None or dtype is None or key not in record.fingerprints or key not in state.fingerprints:
        return None
    if record.fingerprints[key] != state.fingerprints[key]:
        return True
    if key not in record.narrowed:
        return False
    # The same value, but rounded: it is as saved only if it would be rounded to that again.
    exempt = unit.kind == WEIGHT and bool(state.trained) and key not in state.trained
    stored = shape_of(base.metadata.state_dict_metadata[key]).dtype
    return exempt or policy.storage_dtype(unit, dtype) != stored


def _worst(answers: Iterable[bool | None]) -> bool | None:
    several = set(answers)
    return True if True in several else None if None in several else False
