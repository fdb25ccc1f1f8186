"""What the coordinator of a save makes of all ranks' plans. It reads plans and writes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlan

from tailor_dcp import drifts
from tailor_dcp.base import Base
from tailor_dcp.changes import Parts, remembered
from tailor_dcp.decision import Decision
from tailor_dcp.errors import ConflictingStateError
from tailor_dcp.layers import Entry, LayerMap, trained
from tailor_dcp.lineage import Chain
from tailor_dcp.location import Location
from tailor_dcp.metadata.compose import Shape
from tailor_dcp.metadata.record import Origin, Record, UnitRecord
from tailor_dcp.policies import Policy
from tailor_dcp.selection import State, narrower
from tailor_dcp.ties import Tie, merge_ties
from tailor_dcp.units import STEP, WEIGHT, Unit


@dataclass(frozen=True)
class RankInfo:
    """What each rank tells the coordinator besides its items.

    Attributes:
        paths: the path in the nested state dict of each key.
        shapes: global size and dtype of each key that this rank holds a part of.
        ties: groups of keys that share storage here.
        fingerprints: of each chunk here; empty unless the policy needs them.
        drifts: what tells how far each chunk here moved; empty unless the policy needs it.
    """

    paths: Mapping[str, tuple[str | int, ...]]
    shapes: Mapping[str, Shape]
    ties: tuple[Tie, ...]
    fingerprints: Parts = field(default_factory=dict)
    drifts: drifts.Measured = field(default_factory=drifts.Measured)


@dataclass(frozen=True)
class Prepared:
    """A save that is decided but not yet planned.

    Attributes:
        target: the checkpoint being written.
        save_id: the save's id.
        chain: the ancestors of what is saved.
        base: the checkpoint that is carried from, if any.
        state: what is saved, over all ranks.
        decision: what is due and where the rest comes from.
        present: files that lay in the target's folder before.
    """

    target: Location
    save_id: str
    chain: Chain
    base: Base | None
    state: State
    decision: Decision
    present: frozenset[str]

    @property
    def carried(self) -> set[str]:
        """The keys of the state dict that are carried."""
        return {key for unit in self.decision.origins for key in self.state.units[unit]}


class Ahead(NamedTuple):
    """What the ranks are told before they stage: the save's id, its ancestors, the keys that are carried."""

    save_id: str
    chain: Chain
    carried: frozenset[str]


@dataclass(frozen=True)
class Assignment:
    """What the coordinator tells each rank besides its items."""

    save_id: str
    chain: Chain
    cohorts: Mapping[str, str]


def gather(infos: list[RankInfo], layers: LayerMap, base: Base | None) -> State:
    """Describe the state that all ranks together are saving.

    Raises:
        ConflictingStateError: two ranks hold one key with different shapes or dtypes.
    """
    shapes = _agreed(infos)
    paths = {key: path for info in infos for key, path in info.paths.items() if key in shapes}
    entries = layers.classify(paths, {key for key, shape in shapes.items() if shape.size is not None})
    units: dict[Unit, list[str]] = {}
    for key, entry in entries.items():
        units.setdefault(entry.unit, []).append(key)
    seen = [tie for info in infos for tie in info.ties]
    earlier = base.record.ties if base and base.record else ()
    known = (tuple(key for key in tie if key in entries) for tie in merge_ties([*seen, *earlier]))
    ties = _of_parameters([tie for tie in known if len(tie) > 1], entries, shapes)
    return State(
        shapes=shapes,
        units={unit: tuple(keys) for unit, keys in units.items()},
        ties=ties,
        trained=_with_twins(trained(entries), ties),
    )


def _of_parameters(ties: list[Tie], entries: Mapping[str, Entry], shapes: Mapping[str, Shape]) -> tuple[Tie, ...]:
    """Leave out what several parameters' states merely look things up in, as bitsandbytes' ``qmap``.

    Such a table would make all layers due in every save for its sake alone, and their steps with
    it. States of several parameters are one only if these share all other states as well.
    """
    owner = {key: number for number, tie in enumerate(ties) for key in tie}
    states: dict[str, dict[str, int | str]] = {}
    for key, entry in entries.items():
        if entry.unit.kind not in (WEIGHT, STEP) and shapes[key].size is not None:
            states.setdefault(entry.fqn, {})[entry.unit.kind] = owner.get(key, key)

    def one(tie: Tie) -> bool:
        if any(entries[key].unit.kind == WEIGHT for key in tie):
            return True
        first, *others = (states.get(fqn, {}) for fqn in dict.fromkeys(entries[key].fqn for key in tie))
        return all(other == first for other in others)

    return tuple(tie for tie in ties if one(tie))


def _with_twins(keys: set[str], ties: Iterable[Tie]) -> frozenset[str]:
    """Add the other names of tied weights: an optimizer knows each only by one."""
    return frozenset(keys).union(*(tie for tie in ties if not keys.isdisjoint(tie)))


def keep_due(plans: list[SavePlan], carried: set[str]) -> list[SavePlan]:
    """Drop the items that are carried."""
    if not carried:
        return plans
    return [replace(p, items=[i for i in p.items if i.index.fqn not in carried]) for p in plans]


def narrow(plans: list[SavePlan], decision: Decision, state: State, policy: Policy) -> dict[str, str]:
    """Give due items the dtype that the policy stores them in.

    Returns:
        The training state's dtype of each key that is narrowed.
    """
    stored = narrower(decision.due, state, policy)
    for item in (item for plan in plans for item in plan.items) if stored else ():
        if item.index.fqn in stored and item.tensor_data is not None:
            item.tensor_data.properties.dtype = stored[item.index.fqn]
    return {key: str(state.shapes[key].dtype) for key in stored}


def make_record(
    decision: Decision,
    state: State,
    base: Base | None,
    target: Location,
    narrowed: Mapping[str, str],
    policy: Policy,
    save_id: str,
) -> Record:
    """Write down what this save is and where each unit's bytes come from."""
    own = Origin(save_id, target.step, target.name, decision.request.index)
    origins = {unit: decision.origins.get(unit, own) for unit in state.units}
    earlier = base.record.narrowed if base and base.record else {}
    kept = {key: dtype for unit in decision.origins for key in state.units[unit] if (dtype := earlier.get(key))}
    crcs = base.record.crcs if base and base.record else {}
    parent_time = base.record.time if base and base.record else 0.0
    return Record(
        save_id=save_id,
        step=target.step,
        index=decision.request.index,
        # Clocks of different machines disagree; a child must still come after its parent.
        time=max(time.time(), parent_time + 1e-3),
        policy=str(policy),
        carry=decision.mode,
        parent=base.origin if base else None,
        units={unit: UnitRecord(origins[unit], keys) for unit, keys in state.units.items()},
        narrowed={**narrowed, **kept},
        ties=state.ties,
        crcs={new: crcs[old] for old, new in decision.paths.items() if old in crcs},
        fingerprints=remembered(state, decision.origins, base),
        sketches=drifts.remembered(state, decision.origins, base),
    )


def assign(plans: list[SavePlan], save_id: str, chain: Chain, labels: Mapping[str, str]) -> list[SavePlan]:
    """Tell every rank the save's id, in the names of its files, and what lives and dies together."""
    return [
        replace(
            plan,
            storage_data=_StoragePrefix(f"__{rank}_{save_id[:8]}_"),
            planner_data=Assignment(save_id, chain, _only(labels, {i.index.fqn for i in plan.items})),
        )
        for rank, plan in enumerate(plans)
    ]


def shapes_of(plan: SavePlan) -> dict[str, Shape]:
    """Return global size and dtype of what a rank's items are parts of."""
    shapes: dict[str, Shape] = {}
    for item in plan.items:
        data = item.tensor_data
        shapes[item.index.fqn] = _NO_TENSOR if data is None else Shape(data.size, data.properties.dtype)
    return shapes


def _agreed(infos: list[RankInfo]) -> dict[str, Shape]:
    """Put the shapes of all ranks together. Most jobs' ranks hold the same keys, which is seen at once."""
    shapes = dict(infos[0].shapes)
    for rank, info in enumerate(infos):
        if info.shapes == infos[0].shapes:
            continue
        for key, shape in info.shapes.items():
            known = shapes.setdefault(key, shape)
            if known != shape:
                holder = next(r for r, i in enumerate(infos) if key in i.shapes)
                raise ConflictingStateError(
                    f"{key} is {_words(known)} on rank {holder} but {_words(shape)} on rank {rank}; every rank must "
                    f"hold a part of the same tensor."
                )
    return shapes


_NO_TENSOR = Shape(None, None)


def _words(shape: Shape) -> str:
    return "no tensor" if shape.size is None else f"{tuple(shape.size)} {shape.dtype}"


def _only(labels: Mapping[str, str], keys: set[str]) -> dict[str, str]:
    return {key: labels[key] for key in keys if key in labels}
