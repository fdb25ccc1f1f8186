"""Repair plans: for what is damaged in a checkpoint, which other checkpoint still has it, as a recipe for ``merge``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import yaml

from tailor_dcp.base import Base
from tailor_dcp.inspection import OTHER, unit_records
from tailor_dcp.metadata.record import Origin
from tailor_dcp.units import STEP, WEIGHT, Unit
from tailor_dcp.verifying.findings import Finding, Verdict

Damaged = frozenset[Unit] | None
"""The units of a checkpoint that are damaged; None if its metadata is, so that nothing of it can be believed."""


@dataclass(frozen=True)
class Taken:
    """What comes from another checkpoint.

    Attributes:
        layer: the layer; None for what belongs to none.
        kinds: which of its kinds.
        source: the checkpoint that it comes from.
        origin_step: the step whose values these are.
        same: whether they are the very values that were lost.
    """

    layer: str | None
    kinds: tuple[str, ...]
    source: str
    origin_step: int | None
    same: bool


@dataclass(frozen=True)
class RepairPlan:
    """How to get a loadable state in place of a damaged checkpoint.

    Attributes:
        checkpoint: its name.
        base: the checkpoint that everything else comes from; None if no other one is whole.
        taken: what comes from others.
        lost: what no checkpoint has any more, so that an older one is taken as a whole.
        recipe: the recipe that ``tailor merge`` follows; None if there is nothing to make it of.
    """

    checkpoint: str
    base: str | None
    taken: tuple[Taken, ...]
    lost: tuple[str, ...]
    recipe: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins."""
        return asdict(self)

    def yaml(self) -> str:
        """Return the recipe as a file has it."""
        return "".join(f"# {line}\n" for line in self.lines()) + yaml.safe_dump(
            self.recipe, sort_keys=False, default_flow_style=None
        )

    def lines(self) -> Iterator[str]:
        """Yield what the plan is, a sentence a line."""
        if self.base is None:
            yield f"{self.checkpoint}: no other checkpoint of the run is whole; nothing can be put in its place."
            return
        if self.lost:
            more = f" and {len(self.lost) - 1} more" if len(self.lost) > 1 else ""
            yield (
                f"{self.checkpoint} has lost {self.lost[0]}{more}, which no other checkpoint can give: {self.base} is "
                f"taken as a whole."
            )
            return
        yield f"{self.checkpoint}, with what is damaged in it from others:"
        for taken in self.taken:
            what = f"{taken.layer}: {', '.join(taken.kinds)}" if taken.layer else "step, scheduler, RNG, param groups"
            of = "" if taken.origin_step is None else f" (of step {taken.origin_step})"
            same = ", the very values" if taken.same else ""
            yield f"  {what} from {taken.source}{of}{same}"


class Candidate(NamedTuple):
    """A checkpoint that something may be taken from.

    Attributes:
        base: the checkpoint.
        time: when it was saved.
        damaged: what of it is damaged.
    """

    base: Base
    time: float
    damaged: Damaged

    @property
    def name(self) -> str:
        """What a recipe calls it."""
        return str(self.base.location.folder)


def damaged_units(findings: Iterable[Finding], checkpoint: str) -> Damaged:
    """Return which units of a checkpoint the findings say to be damaged."""
    units: set[Unit] = set()
    for finding in findings:
        if finding.checkpoint != checkpoint or finding.state != "damaged":
            continue
        if finding.layer is not None and finding.kind is not None:
            units.add(Unit(finding.layer, finding.kind))
        elif finding.blobs or finding.key is not None:
            units.add(OTHER)
        else:
            return None
    return frozenset(units)


def units_to_take(base: Base, damaged: frozenset[Unit]) -> list[frozenset[Unit]]:
    """Return the units that must come from elsewhere, in groups of which each comes from one checkpoint.

    The moments of a layer belong together, and so do parameters that are tied.
    """
    records = unit_records(base)
    unit_of = {key: unit for unit, held in records.items() for key in held.keys}
    groups = [frozenset(unit for unit in records if _belongs(unit, one)) | {one} for one in damaged]
    ties = base.record.ties if base.record else ()
    for tie in ties:
        tied = frozenset(unit_of[key] for key in tie if key in unit_of)
        if any(tied & group for group in groups):
            groups.append(tied)
    joined: list[frozenset[Unit]] = []
    for group in groups:
        apart = [other for other in joined if not other & group]
        joined = [*apart, group.union(*(other for other in joined if other & group))]
    return sorted(joined, key=sorted)


def _belongs(unit: Unit, other: Unit) -> bool:
    return unit == other or (unit.layer == other.layer and WEIGHT not in (unit.kind, other.kind))


def plan(mine: Candidate | None, verdict: Verdict, others: Sequence[Candidate]) -> RepairPlan:
    """Make the plan for one damaged checkpoint.

    Args:
        mine: the checkpoint; None if its metadata cannot be read.
        verdict: what came of it.
        others: all other checkpoints of its run and series whose metadata can be read and believed.
    """
    name = verdict.name
    newest = _newest_first(others)
    older = [other for other in newest if _is_older(other, mine, verdict)]
    whole = next((other for other in older if other.damaged == frozenset()), None)
    if mine is None or mine.damaged is None:
        return _instead(name, whole, (".metadata",))
    taken: list[tuple[frozenset[Unit], Candidate, bool]] = []
    lost: list[str] = []
    for group in units_to_take(mine.base, mine.damaged):
        found = _source(group, mine.base, newest, older)
        if found is None:
            lost.append(", ".join(map(str, sorted(group))))
        else:
            taken.append((group, *found))
    if lost:
        return _instead(name, whole, tuple(lost))
    takes = tuple(take for group, source, same in taken for take in _takes(group, source, same))
    return RepairPlan(name, mine.name, takes, (), _recipe(mine.name, takes))


def _newest_first(others: Sequence[Candidate]) -> list[Candidate]:
    told = all(_tells_time(other) for other in others)
    return sorted(others, key=lambda other: (0 if told else _step(other), other.time), reverse=True)


def _is_older(other: Candidate, mine: Candidate | None, verdict: Verdict) -> bool:
    told = mine is not None and _tells_time(mine) and _tells_time(other)
    if told or verdict.step is None or _step(other) < 0:
        return other.time < verdict.time
    return _step(other) < verdict.step


def _tells_time(one: Candidate) -> bool:
    """Tell whether it is known when a checkpoint was saved; its file's time is that of the last copying."""
    return one.base.record is not None


def _step(one: Candidate) -> int:
    return -1 if one.base.origin.step is None else one.base.origin.step


def _instead(name: str, whole: Candidate | None, lost: tuple[str, ...]) -> RepairPlan:
    base = whole.name if whole else None
    return RepairPlan(name, base, (), lost, {"base": base} if base else None)


def _source(
    group: frozenset[Unit], base: Base, newest: Sequence[Candidate], older: Sequence[Candidate]
) -> tuple[Candidate, bool] | None:
    """Return where units come from: the very values if anybody has them, else the newest older ones."""
    wanted = _saves(base, group)
    intact = [other for other in newest if other.damaged is not None and not other.damaged & group]
    for other in intact:
        if wanted is not None and _saves(other.base, group) == wanted:
            return other, True
    return next(((other, False) for other in older if other in intact and _origins(other.base, group)), None)


def _origins(base: Base, group: frozenset[Unit]) -> dict[Unit, Origin] | None:
    """Return the origins of units; None if the checkpoint does not have all of them."""
    records = unit_records(base)
    found = {unit: records[unit].origin for unit in group if unit in records}
    if OTHER in group:
        found[OTHER] = base.origin
    return found if len(found) == len(group) else None


def _saves(base: Base, group: frozenset[Unit]) -> dict[Unit, str] | None:
    """Return the saves whose values units have; None if that is not known of all of them."""
    saves = {unit: origin.save_id for unit, origin in (_origins(base, group) or {}).items()}
    return saves if saves and all(saves.values()) else None


def _takes(group: frozenset[Unit], source: Candidate, same: bool) -> Iterator[Taken]:
    origins = _origins(source.base, group) or {}
    for layer in dict.fromkeys(unit.layer for unit in sorted(group)):
        units = sorted(unit for unit in group if unit.layer == layer)
        steps = [origins[unit].step for unit in units if unit in origins]
        kinds = tuple(unit.kind for unit in units if unit.kind != STEP) or (STEP,)  # it goes with the moments
        name = None if layer == OTHER.layer else layer
        yield Taken(name, kinds if name else (), source.name, steps[0] if steps else None, same)


def _recipe(base: str, takes: Sequence[Taken]) -> dict[str, Any]:
    layers: dict[str, list[dict[str, Any]]] = {}
    recipe: dict[str, Any] = {"base": base}
    for take in takes:
        if take.layer is None:
            recipe["train"] = take.source
        else:
            layers.setdefault(take.layer, []).append({"from": take.source, "kinds": list(take.kinds)})
    if layers:
        recipe["layers"] = {layer: found[0] if len(found) == 1 else found for layer, found in layers.items()}
    return recipe
