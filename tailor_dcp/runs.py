"""Runs: folders whose sub-folders are the checkpoints of one training run."""

from __future__ import annotations

import os
import warnings
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
    """

    folder: Path
    step: int
    time: float


def commits(run: str | os.PathLike[str], series: str = "") -> list[Commit]:
    """Return the committed checkpoints of a run in the order in which they were saved.

    The order comes from the records, which copying a run does not change; for checkpoints of
    stock planners, which have none, from the time of their ``.metadata``. One that cannot be
    read is left out, with a warning.
    """
    found = []
    for path in place(run).glob(f"*/{series}/{METADATA}" if series else f"*/{METADATA}"):
        here = locate(path.parent)
        if here.step is not None and here.series == series:
            time = _time(path)
            if time is not None:
                found.append(Commit(path.parent, here.step, time))
    return sorted(found, key=lambda commit: commit.time)


def latest(run: str | os.PathLike[str], before: int | None = None, series: str = "") -> Path | None:
    """Return the newest committed checkpoint of a run, None if there is none.

    Newest is what was saved last, not what has the highest number: after a run went back to
    step 100, the abandoned step 200 is older than the new step 150. Where the two disagree a
    warning says so.

    Args:
        run: the run's folder, or its URL; it need not exist yet.
        before: only look at steps below this one.
        series: for runs that keep several checkpoints a step, which (``"optimizer_0"``).
    """
    eligible = [c for c in commits(run, series) if before is None or c.step < before]
    if not eligible:
        return None
    newest, highest = eligible[-1], max(eligible, key=lambda commit: commit.step)
    if highest.step > newest.step:
        warnings.warn(
            f"{newest.folder} was saved after {highest.folder}, which has the higher number: the run went back, "
            f"and {newest.folder.name} is its newest state.",
            TailorWarning,
            stacklevel=2,
        )
    return newest.folder


def _time(path: Path) -> float | None:
    try:
        record = record_of(read(path), str(path))
        return record.time if record else path.stat().st_mtime
    except (TailorError, OSError) as error:
        warnings.warn(f"{path.parent} is passed over: {error}", TailorWarning, stacklevel=4)
        return None
