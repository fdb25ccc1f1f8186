"""Verifying: whether every byte that a checkpoint needs is there and is the one that was written.

Whatever has a checksum is compared with it; what has none is called unverifiable, never good.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from tailor_dcp.base import open_base
from tailor_dcp.census import DOOMED
from tailor_dcp.collector import collector_off
from tailor_dcp.errors import NoCheckpointError, TailorError
from tailor_dcp.location import DEEPEST_SERIES, METADATA, locate
from tailor_dcp.materialize import cores
from tailor_dcp.store_path import place
from tailor_dcp.stores import is_remote
from tailor_dcp.units import Unit
from tailor_dcp.verifying.findings import Finding, Verdict, Verification
from tailor_dcp.verifying.repair import Candidate, RepairPlan, damaged_units, plan, units_to_take
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
    return tuple(_plan(one, found, threads, progress) for one in found.checkpoints if one.state == "damaged")


def _verified(
    root: Path,
    folders: Sequence[Path],
    threads: int | None,
    progress: Progress | None,
    units: Collection[Unit] | None = None,
) -> Verification:
    begun = time.monotonic()
    run = RunCheck(root, threads or (_AT_ONCE if is_remote(root) else cores()), progress)
    run.announce(folders if len(folders) > 1 else ())
    with collector_off():
        for folder in folders:
            run.check(folder, units)
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


def _committed(root: Path) -> list[Path]:
    """Return the committed checkpoints at or below a folder.

    Raises:
        NoCheckpointError: there is none.
    """
    if (root / METADATA).exists():
        return [root]
    folders = _below(root)
    if folders:
        return folders
    if not root.exists():
        raise NoCheckpointError(f"{root} does not exist; give a checkpoint, or a run.")
    raise NoCheckpointError(
        f"{root} holds no committed checkpoint: no {METADATA} is in it or in any folder of it; give another."
    )


def _below(run: Path) -> list[Path]:
    depths = ("/".join("*" * depth) for depth in range(1, DEEPEST_SERIES + 2))
    found = [path.parent for depth in depths for path in run.glob(f"{depth}/{METADATA}")] if run.is_dir() else []
    return sorted(
        folder
        for folder in found
        if not _is_linked(folder, run) and not any(name.startswith(DOOMED) for name in folder.relative_to(run).parts)
    )


def _is_linked(folder: Path, run: Path) -> bool:
    """Tell whether a folder is another name of one that is elsewhere, such as what ``latest`` leads to."""
    inside = folder.relative_to(run)
    return any((run / part).is_symlink() for part in (inside, *list(inside.parents)[:-1]))


# Repair -----------------------------------------------------------------------------------


def _plan(verdict: Verdict, found: Verification, threads: int | None, progress: Progress | None) -> RepairPlan:
    mine = _candidate(verdict, found)
    here = locate(verdict.path)
    siblings = [path for path in _below(here.run) if locate(path).series == here.series and path != here.folder]
    known = {one.path for one in found.checkpoints}
    if all(str(path) in known for path in siblings):
        return plan(mine, verdict, _candidates(siblings, found))
    if mine is not None and mine.damaged is not None:
        needed = frozenset().union(*units_to_take(mine.base, mine.damaged))
        others = _verified(here.run, siblings, threads, progress, needed)
        made = plan(mine, verdict, _candidates(siblings, others))
        if not made.lost:
            return made
    others = _verified(here.run, siblings, threads, progress)
    return plan(mine, verdict, _candidates(siblings, others))


def _candidates(folders: Sequence[Path], found: Verification) -> list[Candidate]:
    verdicts = {one.path: one for one in found.checkpoints}
    there = [verdicts[str(folder)] for folder in folders if str(folder) in verdicts]  # others were removed meanwhile
    all_found = [_candidate(verdict, found) for verdict in there]
    return [one for one in all_found if one is not None]


def _candidate(verdict: Verdict, found: Verification) -> Candidate | None:
    """Return a checkpoint as something to take from; None if it cannot be read."""
    try:
        base = open_base(place(verdict.path))
    except TailorError:
        return None
    return Candidate(base, verdict.time, damaged_units(found.findings, verdict.name))
