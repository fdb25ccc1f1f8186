"""Runs: folders whose sub-folders are the checkpoints of one training run."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tailor_dcp.errors import TailorError, TailorWarning
from tailor_dcp.location import METADATA, locate
from tailor_dcp.metadata.record import record_of
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.store_path import place


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint of a run.

    Attributes:
        folder: its path.
        step: its training step.
        time: when it was saved, seconds since the epoch.
        told: whether its record says so. A stock planner leaves none; the time is that of its file then, which
            copying changes.
    """

    folder: Path
    step: int
    time: float
    told: bool = True


def in_order(saved: Iterable[Commit]) -> list[Commit]:
    """Return checkpoints in the order in which they were saved.

    It comes from the records, which copying a run does not change. What has none is placed by its step, behind the
    last one with a lower step that was not saved after its file was written: copying makes that time later, never
    earlier.
    """
    found = list(saved)
    told = [one for one in found if one.told]

    def place_of(one: Commit) -> tuple[float, bool, int, float]:
        if one.told:
            return one.time, False, 0, 0.0
        before = (other.time for other in told if other.step < one.step and other.time <= one.time)
        return max(before, default=-math.inf), True, one.step, one.time

    return sorted(found, key=place_of)


def commits(run: str | os.PathLike[str], series: str = "") -> list[Commit]:
    """Return the committed checkpoints of a run in the order in which they were saved (see ``in_order``).

    One that cannot be read is left out, with a warning.
    """
    found = []
    for path in place(run).glob(f"*/{series}/{METADATA}" if series else f"*/{METADATA}"):
        here = locate(path.parent)
        if here.step is not None and here.series == series:
            time = _time(path)
            if time is not None:
                found.append(Commit(path.parent, here.step, *time))
    return in_order(found)


def latest(run: str | os.PathLike[str], before: int | None = None, series: str = "") -> Path | None:
    """Return the newest committed checkpoint of a run, None if there is none.

    Newest is what was saved last, not what has the highest number: after a run went back to
    step 100, the abandoned step 200 is older than the new step 150. Where the two disagree a
    warning says so, and also where that is not known: a stock planner notes no time, and those of
    files are the order of copying as well as they are that of saving.

    Args:
        run: the run's folder, or its URL; it need not exist yet.
        before: only look at steps below this one.
        series: for runs that keep several checkpoints a step, which (``"optimizer_0"``).
    """
    eligible = [c for c in commits(run, series) if before is None or c.step < before]
    if not eligible:
        return None
    newest, highest = eligible[-1], max(eligible, key=lambda commit: commit.step)
    youngest = max(eligible, key=lambda commit: commit.time)
    if not youngest.told and youngest.time > newest.time:
        warnings.warn(
            f"{newest.folder} is taken for the newest checkpoint by its step; {youngest.folder} has the younger file, "
            f"but no record that tells when it was saved: the run was copied, or went back.",
            TailorWarning,
            stacklevel=2,
        )
    if highest.step > newest.step:
        warnings.warn(
            f"{newest.folder} was saved after {highest.folder}, which has the higher number: the run went back, "
            f"and {newest.folder.name} is its newest state.",
            TailorWarning,
            stacklevel=2,
        )
    return newest.folder


def _time(path: Path) -> tuple[float, bool] | None:
    """Return when a checkpoint was saved, and whether its record tells; None if it cannot be read."""
    try:
        record = record_of(read(path), str(path))
        return (record.time, True) if record else (path.stat().st_mtime, False)
    except (TailorError, OSError) as error:
        warnings.warn(f"{path.parent} is passed over: {error}", TailorWarning, stacklevel=4)
        return None
