"""Repair plans: for what is damaged in a checkpoint, which other checkpoint still has it, as a recipe for ``merge``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import yaml

from tailor_dcp.base import Base
from tailor_dcp.inspection import OTHER, unit_records
from tailor_dcp.metadata.record import Origin
from tailor_dcp.names import literal
from tailor_dcp.units import STEP, WEIGHT, Unit
from tailor_dcp.verifying.findings import Finding, Verdict
from tailor_dcp.visible import visible

Units = frozenset[Unit] | None
"""Some of a checkpoint's units; None for all, as where its metadata is damaged and nothing of it can be believed."""

HEAD = "# A repair plan of `tailor verify` for "
"""What every plan's file begins with; the checkpoint's path follows."""


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
        path: its folder.
        base: the checkpoint that everything else comes from; None if no other one is whole.
        taken: what comes from others.
        lost: what no checkpoint has any more, so that an older one is taken as a whole.
        recipe: the recipe that ``tailor merge`` follows; None if there is nothing to make it of.
    """

    checkpoint: str
    path: str
    base: str | None
    taken: tuple[Taken, ...]
    lost: tuple[str, ...]
    recipe: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins."""
        return asdict(self)

    def yaml(self) -> str:
        """Return the recipe as a file has it."""
        comments = [f"{HEAD}{visible(self.path, lines=False)}", *(f"# {line}" for line in self.lines())]
        recipe = yaml.safe_dump(self.recipe, sort_keys=False, default_flow_style=None)
        return "".join(f"{line}\n" for line in comments) + recipe

    def lines(self) -> Iterator[str]:
        """Yield what the plan is, a sentence a line: no name that it tells goes on to another line."""
        return (visible(line, lines=False) for line in self._sentences())

    def _sentences(self) -> Iterator[str]:
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
    """What is to be known of a checkpoint that something may be taken from, or put into.

    Attributes:
        name: what a recipe calls it.
        time: when it was saved.
        step: its step, -1 if none is known.
        tells_time: whether it is known when it was saved; its file's time is that of the last copying.
        damaged: which of its units are damaged.
        unusable: those, and which of its units may be damaged as far as could be seen.
        origins: where the values of each of its units come from.
        ties: units that must come from one checkpoint, as parameters of theirs are tied.
    """

    name: str
    time: float
    step: int
    tells_time: bool
    damaged: Units
    unusable: Units
    origins: Mapping[Unit, Origin]
    ties: tuple[frozenset[Unit], ...]


def candidate(base: Base, time: float, findings: Sequence[Finding]) -> Candidate:
    """Return a checkpoint as something to take from.

    Args:
        base: the checkpoint.
        time: when it was saved.
        findings: what was found out about it.
    """
    records = unit_records(base)
    unit_of = {key: unit for unit, held in records.items() for key in held.keys}
    ties = base.record.ties if base.record else ()
    return Candidate(
        name=str(base.location.folder),
        time=time,
        step=-1 if base.origin.step is None else base.origin.step,
        tells_time=base.record is not None,
        damaged=_units(finding for finding in findings if finding.state == "damaged"),
        unusable=_units(finding for finding in findings if finding.state == "damaged" or finding.undecided),
        origins={**{unit: held.origin for unit, held in records.items()}, OTHER: base.origin},
        ties=tuple(frozenset(unit_of[key] for key in tie if key in unit_of) for tie in ties),
    )


def _units(findings: Iterable[Finding]) -> Units:
    """Return the units that findings are about."""
    units: set[Unit] = set()
    for finding in findings:
        if finding.layer is not None and finding.kind is not None:
            units.add(Unit(finding.layer, finding.kind))
        elif finding.blobs or finding.key is not None:
            units.add(OTHER)
        else:
            return None
    return frozenset(units)


def units_to_take(mine: Candidate) -> list[frozenset[Unit]]:
    """Return the units that must come from elsewhere, in groups of which each comes from one checkpoint.

    The moments of a layer belong together, and so do parameters that are tied.
    """
    moments: dict[str, set[Unit]] = {}
    for unit in mine.origins:
        if unit.kind != WEIGHT:
            moments.setdefault(unit.layer, set()).add(unit)
    damaged = mine.damaged or frozenset()
    lots = [{one} if one.kind == WEIGHT else {one, *moments.get(one.layer, ())} for one in damaged]
    group_of: dict[Unit, set[Unit]] = {}
    for lot in (*mine.ties, *lots):
        joined = set(lot).union(*(group_of[unit] for unit in lot if unit in group_of))
        group_of.update(dict.fromkeys(joined, joined))
    return sorted({frozenset(group_of[unit]) for unit in damaged}, key=sorted)


def plan(mine: Candidate | None, verdict: Verdict, others: Sequence[Candidate]) -> RepairPlan:
    """Make the plan for one damaged checkpoint.

    Args:
        mine: the checkpoint; None if its metadata cannot be read.
        verdict: what came of it.
        others: all other checkpoints of its run and series whose metadata can be read and believed.
    """
    newest = _newest_first(others)
    older = [other for other in newest if _is_older(other, mine, verdict)]
    whole = next((other for other in older if other.unusable == frozenset()), None)
    if mine is None or mine.damaged is None:
        return _instead(verdict, whole, (".metadata",))
    taken: list[tuple[frozenset[Unit], Candidate, bool]] = []
    lost: list[str] = []
    for group in units_to_take(mine):
        found = _source(group, mine, newest, older)
        if found is None:
            lost.append(", ".join(map(str, sorted(group))))
        else:
            taken.append((group, *found))
    if lost:
        return _instead(verdict, whole, tuple(lost))
    takes = tuple(take for group, source, same in taken for take in _takes(group, source, same))
    return RepairPlan(verdict.name, verdict.path, mine.name, takes, (), _recipe(mine.name, takes))


def _newest_first(others: Sequence[Candidate]) -> list[Candidate]:
    told = all(other.tells_time for other in others)
    return sorted(others, key=lambda other: (0 if told else other.step, other.time), reverse=True)


def _is_older(other: Candidate, mine: Candidate | None, verdict: Verdict) -> bool:
    told = mine is not None and mine.tells_time and other.tells_time
    if told or verdict.step is None or other.step < 0:
        return other.time < verdict.time
    return other.step < verdict.step


def _instead(verdict: Verdict, whole: Candidate | None, lost: tuple[str, ...]) -> RepairPlan:
    base = whole.name if whole else None
    return RepairPlan(verdict.name, verdict.path, base, (), lost, {"base": base} if base else None)


def _source(
    group: frozenset[Unit], mine: Candidate, newest: Sequence[Candidate], older: Sequence[Candidate]
) -> tuple[Candidate, bool] | None:
    """Return where units come from: the very values if anybody has them, else the newest older ones."""
    wanted = _saves(mine, group)
    for other in newest if wanted is not None else ():
        if _is_intact(other, group) and _saves(other, group) == wanted:
            return other, True
    found = (other for other in older if _is_intact(other, group) and group <= other.origins.keys())
    return next(((other, False) for other in found), None)


def _is_intact(one: Candidate, group: frozenset[Unit]) -> bool:
    return one.unusable is not None and one.unusable.isdisjoint(group)


def _saves(one: Candidate, group: frozenset[Unit]) -> dict[Unit, str] | None:
    """Return the saves whose values units have; None if that is not known of all of them."""
    saves = {unit: one.origins[unit].save_id for unit in group if unit in one.origins}
    return saves if len(saves) == len(group) and all(saves.values()) else None


def _takes(group: frozenset[Unit], source: Candidate, same: bool) -> Iterator[Taken]:
    for layer in dict.fromkeys(unit.layer for unit in sorted(group)):
        units = sorted(unit for unit in group if unit.layer == layer)
        steps = [source.origins[unit].step for unit in units]
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
        one = {layer: found[0] if len(found) == 1 else found for layer, found in layers.items()}
        recipe["layers"] = {literal(layer): found for layer, found in one.items()}  # merge takes them for globs
    return recipe
