"""Verifying: whether every byte that a checkpoint needs is there and is the one that was written.

Whatever has a checksum is compared with it; what has none is called unverifiable, never good. What could not be read is
neither good nor damaged: nothing is said about it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from tailor_dcp.base import open_base
from tailor_dcp.collector import collector_off
from tailor_dcp.errors import NoCheckpointError, TailorError
from tailor_dcp.listing import Listing, checkpoints_below
from tailor_dcp.location import METADATA, Location, locate, real
from tailor_dcp.materialize import cores
from tailor_dcp.store_path import place
from tailor_dcp.stores import is_remote
from tailor_dcp.units import Unit
from tailor_dcp.verifying.findings import Finding, Verdict, Verification
from tailor_dcp.verifying.repair import Candidate, RepairPlan, candidate, plan, units_to_take
from tailor_dcp.verifying.run_check import RunCheck

Progress = Callable[[int, int], None]

_AT_ONCE = 8
"""Threads that read from a store; each waits most of the time."""

__all__ = ["Finding", "RepairPlan", "Verdict", "Verification", "repair_plans", "verify"]


def verify(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    units: Collection[Unit] | None = None,
) -> Verification:
    """Check a checkpoint, or all checkpoints of a run, against every checksum that there is.

    Nothing is written and nothing is executed. Files that checkpoints share are read once.

    Args:
        path: a checkpoint, or a run, or the URL of either.
        threads: that read; None for four, or as many as there are cores, and eight from a store.
        progress: is told how many of how many bytes are done.
        units: look at nothing but these, and at metadata; None for everything.

    Raises:
        NoCheckpointError: there is no committed checkpoint.
        OSError: a run in a store cannot be listed.
    """
    root = place(path)
    return _verified(root, _committed(root), threads, progress, units)


def repair_plans(
    found: Verification, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[RepairPlan, ...]:
    """Find for each damaged checkpoint what other checkpoints of its run have in its place.

    Of each damaged unit the very values are taken where another checkpoint has them, else those of the newest older
    one that has it intact. Where one checkpoint alone was verified, others are as far as something is taken from them.

    Args:
        found: what ``verify`` found.
        threads: see ``verify``.
        progress: see ``verify``.
    """
    told, made = _Told(found), dict[str, RepairPlan]()
    lots: dict[tuple[Path, str], list[Verdict]] = {}
    for verdict in found.checkpoints:
        if verdict.state == "damaged":
            here = _located(verdict.path)
            lots.setdefault((here.run, here.series), []).append(verdict)
    for (run, series), damaged in lots.items():
        folders = [path for path in checkpoints_below(run).folders if locate(path).series == series]
        siblings = _Siblings(run, folders, told, threads, progress)
        made.update((one.path, one) for one in siblings.plans(damaged))
    return tuple(made[one.path] for one in found.checkpoints if one.path in made)


def _verified(
    root: Path,
    listing: Listing,
    threads: int | None,
    progress: Progress | None,
    units: Collection[Unit] | None = None,
) -> Verification:
    begun, folders = time.monotonic(), listing.folders
    run = RunCheck(root, threads or (_AT_ONCE if is_remote(root) else cores()), progress)
    run.announce(folders if len(folders) > 1 else ())
    with collector_off():
        for folder in folders:
            run.check(folder, units)
        for unlisted in listing.unlisted:
            run.unlisted(*unlisted)
        run.compare_copies()
    verdicts = run.verdicts()
    if folders and not verdicts:
        raise NoCheckpointError(f"{root} holds no committed checkpoint any more; it was removed meanwhile.")
    return Verification(
        path=str(root),
        checkpoints=tuple(verdicts),
        findings=tuple(run.findings),
        notes=tuple(run.notes()),
        files=run.files,
        blobs=run.blobs,
        bytes=run.done,
        seconds=time.monotonic() - begun,
    )


def _committed(root: Path) -> Listing:
    """Return the committed checkpoints at or below a folder.

    Raises:
        NoCheckpointError: there is none, as far as can be seen.
    """
    if (root / METADATA).exists():
        return Listing([root], [])
    found = checkpoints_below(root)
    if found.folders:
        return found
    if not root.exists():
        raise NoCheckpointError(f"{root} does not exist; give a checkpoint, or a run.")
    if found.unlisted:
        folder, why = found.unlisted[0]
        raise NoCheckpointError(f"{root} holds no committed checkpoint that can be seen: {folder} {why}.")
    raise NoCheckpointError(
        f"{root} holds no committed checkpoint: no {METADATA} is in it or in any folder of it; give another."
    )


# Repair -----------------------------------------------------------------------------------


def _located(path: str) -> Location:
    """Return where a checkpoint stands; where a link tells no step, as ``latest``, where what it leads to stands."""
    here = locate(path)
    return locate(real(path)) if here.step is None and here.folder.is_symlink() else here


class _Told:
    """What a verification tells of checkpoints as something to take from.

    Args:
        found: the verification.
    """

    def __init__(self, found: Verification) -> None:
        self.verdicts = {one.path: one for one in found.checkpoints}
        self._findings: dict[str, list[Finding]] = {}
        for finding in found.findings:
            self._findings.setdefault(finding.checkpoint, []).append(finding)

    def candidates(self, folders: Iterable[Path]) -> dict[str, Candidate]:
        """Return those of some checkpoints that can be read, and were not removed meanwhile."""
        there = [self.verdicts[str(folder)] for folder in folders if str(folder) in self.verdicts]
        found = {verdict.path: self.candidate(verdict) for verdict in there}
        return {path: one for path, one in found.items() if one is not None}

    def candidate(self, verdict: Verdict) -> Candidate | None:
        """Return one checkpoint; None if it cannot be read."""
        try:
            base = open_base(place(verdict.path))
        except TailorError:
            return None
        return candidate(base, verdict.time, self._findings.get(verdict.name, ()))


class _Siblings:
    """The checkpoints of one run and series. Those that were not verified are, as far as it is needed.

    Args:
        run: the run.
        folders: all of them.
        told: what is known already.
        threads: see ``verify``.
        progress: see ``verify``.
    """

    def __init__(
        self, run: Path, folders: Sequence[Path], told: _Told, threads: int | None, progress: Progress | None
    ) -> None:
        self._run, self._told = run, told
        self._threads, self._progress = threads, progress
        self._known = told.candidates(folders)
        self._unknown = [folder for folder in folders if str(folder) not in told.verdicts]

    def plans(self, damaged: Sequence[Verdict]) -> Iterator[RepairPlan]:
        """Yield the plan for each damaged one."""
        mine = {one.path: self._known.get(one.path) or self._told.candidate(one) for one in damaged}
        units = frozenset(unit for one in mine.values() if one for group in units_to_take(one) for unit in group)
        some = self._candidates(units) if self._unknown and units else [*self._known.values()]
        for verdict in damaged:
            made = self._plan(mine[verdict.path], verdict, some)
            yield self._plan(mine[verdict.path], verdict, self._all) if made.lost and self._unknown else made

    def _plan(self, mine: Candidate | None, verdict: Verdict, some: Sequence[Candidate]) -> RepairPlan:
        return plan(mine, verdict, [one for one in some if one.name != verdict.path])

    @cached_property
    def _all(self) -> list[Candidate]:
        return self._candidates(None)

    def _candidates(self, units: Collection[Unit] | None) -> list[Candidate]:
        """Return all of them that can be read, the unknown ones verified as far as some units go, or wholly."""
        known = [*self._known.values()]
        try:
            more = _verified(self._run, Listing(self._unknown, []), self._threads, self._progress, units)
        except NoCheckpointError:  # they were removed meanwhile
            return known
        return [*known, *_Told(more).candidates(self._unknown).values()]
