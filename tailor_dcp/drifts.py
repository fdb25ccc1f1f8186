"""How far each unit moved since its own last save: the ranks' samples, put together and compared with a base's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from tailor_dcp.base import Base
from tailor_dcp.policies import Policy
from tailor_dcp.selection import State
from tailor_dcp.sketch import Moved, Part, Samples, Taken, assemble, moved, pack, relative, take, unpack
from tailor_dcp.units import STEP, Unit

Lookup = Callable[[MetadataIndex], object]
Series = tuple[str, str]
"""A run's folder and a series in it."""


class Since(NamedTuple):
    """How far a chunk moved since a copy of it was kept.

    Attributes:
        save_id: the save that it was kept in.
        elements: how many the chunk has.
        moved: the sums of squares.
    """

    save_id: str
    elements: int
    moved: Moved


@dataclass(frozen=True)
class Measured:
    """What a rank tells of its chunks.

    Attributes:
        samples: the samples that lie in them.
        since: how far they moved since this process last saved them; only in exact mode, and only of
            what it keeps a copy of.
    """

    samples: Mapping[Part, Taken] = field(default_factory=dict)
    since: Mapping[Part, Since] = field(default_factory=dict)


# Exact mode pays with memory: a copy of every chunk as it was last saved, on the device where it is.
_copies: dict[Series, dict[Part, tuple[str, torch.Tensor]]] = {}


def measure(plan: SavePlan, lookup: Lookup, policy: Policy, series: Series) -> Measured:
    """Look at a rank's chunks as far as the policy asks for.

    Args:
        plan: the rank's items, before any is dropped.
        lookup: gives the tensor of an item.
        policy: says whether drift is needed, and how exactly.
        series: where the save goes.
    """
    if not policy.needs_drift:
        return Measured()
    chunks = _chunks(plan, lookup)
    since: dict[Part, Since] = {}
    kept = _copies.get(series, {}) if policy.needs_drift == "exact" else {}
    for part, (tensor, _) in chunks.items():
        save_id, copy = kept.get(part, ("", None))
        if copy is not None and copy.shape == tensor.shape and copy.device == tensor.device:
            since[part] = Since(save_id, tensor.numel(), _moved(copy, tensor.detach()))
    return Measured(take(chunks), since)


def keep(plan: SavePlan, lookup: Lookup, policy: Policy, series: Series, save_id: str) -> None:
    """Keep copies of the chunks that this rank writes, in exact mode."""
    if policy.needs_drift == "exact":
        kept = _copies.setdefault(series, {})
        kept.update({part: (save_id, t.detach().clone()) for part, (t, _) in _chunks(plan, lookup).items()})


def forget() -> None:
    """Give the copies' memory back; what they told is unknown from now on, and sketches stand in for it."""
    _copies.clear()


def compare(state: State, ranks: Sequence[Measured], base: Base | None, policy: Policy) -> State:
    """Return the state with its sketches and each unit's drift, if the policy asks for that."""
    if not policy.needs_drift:
        return state
    sizes = {
        key: size
        for unit, keys in state.units.items()
        if unit.kind != STEP
        for key in keys
        if (size := state.shapes[key].size) is not None and _counts(state.shapes[key].dtype)
    }
    parts = (item for rank in ranks for item in rank.samples.items())
    state = replace(state, sketches=assemble(parts, sizes))
    return replace(state, drift=_drift(state, ranks, base)) if base and base.record else state


def remembered(state: State, carried: Iterable[Unit], base: Base | None) -> dict[str, bytes]:
    """Return the sketches to keep: of the values that are written, and for what is carried, those it had."""
    old = base.record.sketches if base and base.record else {}
    kept = {key for unit in carried for key in state.units[unit]}
    new = {key: pack(samples) for key, samples in state.sketches.items() if key not in kept}
    return new | {key: old[key] for key in kept if key in old}


def _chunks(plan: SavePlan, lookup: Lookup) -> dict[Part, tuple[torch.Tensor, torch.Size]]:
    found: dict[Part, tuple[torch.Tensor, torch.Size]] = {}
    for item in plan.items:
        data = item.tensor_data
        if data is None or not _counts(data.properties.dtype):
            continue
        tensor = lookup(item.index)
        # A stager may have left a placeholder for what it knows to be carried.
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.shape == data.chunk.sizes:
            found[item.index.fqn, tuple(data.chunk.offsets)] = tensor, data.size
    return found


def _counts(dtype: torch.dtype | None) -> bool:
    """Tell whether a tensor's values say how far it moved: numbers of bits, counters and codes do not."""
    return dtype is not None and dtype.is_floating_point


def _moved(before: torch.Tensor, now: torch.Tensor) -> Moved:
    change = torch.linalg.vector_norm(now.float() - before.float(), dtype=torch.float64)
    return Moved(change.item() ** 2, torch.linalg.vector_norm(before.float(), dtype=torch.float64).item() ** 2)


def _drift(state: State, ranks: Sequence[Measured], base: Base) -> dict[Unit, float]:
    """Return each unit's relative change; left out where it is not known."""
    found: dict[Unit, list[Moved]] = {}
    since = {part: told for rank in ranks for part, told in rank.since.items() if _is_from(part, told, state, base)}
    exact: dict[str, list[Since]] = {}
    for (key, _), told in since.items():
        exact.setdefault(key, []).append(told)
    for unit, keys in state.units.items():
        parts = [_key_moved(key, exact.get(key, []), state, base) for key in keys if _counts(state.shapes[key].dtype)]
        known = [part for part in parts if part is not None]
        if unit.kind != STEP and known and len(known) == len(parts):
            found[unit] = known
    for group in state.tied_units:  # policies see only one of several tied units
        if all(unit in found for unit in group):
            together = [part for unit in group for part in found[unit]]
            found.update(dict.fromkeys(group, together))
        else:
            found = {unit: parts for unit, parts in found.items() if unit not in group}
    return {unit: relative(parts) for unit, parts in found.items()}


def _is_from(part: Part, told: Since, state: State, base: Base) -> bool:
    origin = base.holdings().origins.get(part[0])
    return origin is not None and origin.save_id == told.save_id


def _key_moved(key: str, exact: Sequence[Since], state: State, base: Base) -> Moved | None:
    size = state.shapes[key].size
    assert size is not None
    if exact and sum(told.elements for told in exact) == math.prod(size):
        return Moved(math.fsum(t.moved.change for t in exact), math.fsum(t.moved.before for t in exact))
    now, packed = state.sketches.get(key), base.record.sketches.get(key) if base.record else None
    if now is None or packed is None:
        return None
    before = _samples(packed)
    return moved(before, now, math.prod(size)) if before is not None and len(before) == len(now) else None


def _samples(packed: bytes) -> Samples | None:
    try:
        return unpack(packed)
    except ValueError:  # somebody else's record
        return None
