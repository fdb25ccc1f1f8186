"""Pruning: removing the checkpoints of a run that no rule keeps, without freeing a byte in use.

Choosing (``choosing``, by the rules of ``retention``) is apart from freeing: what is chosen is told with its reasons,
and a dry run ends there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tailor_dcp import compact as compacting
from tailor_dcp.census import Checkpoint, Entry, needed
from tailor_dcp.dead_bytes import Rewrite, rewrites, survey
from tailor_dcp.errors import NoCheckpointError, TailorError
from tailor_dcp.location import METADATA, is_url
from tailor_dcp.metrics import read_metric
from tailor_dcp.prune_plan import PrunePlan, Verdict, looking_into, make_plan
from tailor_dcp.removal import free, remove, strip, withdraw
from tailor_dcp.retention import All, Best, Every, Last, Mode, PruneRefusedError, Rule, Within, span

__all__ = ["PruneRefusedError", "Pruning", "Rewrite", "Verdict", "prune"]

DEAD_SHARE = 0.5
"""The share of a file that may be dead before it is rewritten, where nobody says otherwise."""
METRIC = "eval_loss"
"""What tells the best checkpoint, where nobody says otherwise."""


@dataclass(frozen=True)
class Pruning:
    """What ``prune`` did, or with ``dry_run`` would do.

    Attributes:
        run: the run's folder.
        dry_run: whether nothing was touched.
        verdicts: one for each folder that holds a checkpoint or a part of one, and for what killed calls have left.
        rewrites: one for each file of which more than the threshold is dead, if ``compact`` was asked for.
    """

    run: str
    dry_run: bool
    verdicts: tuple[Verdict, ...]
    rewrites: tuple[Rewrite, ...] = ()

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of what stays: checkpoints, and what is not committed or not known to be dead."""
        return tuple(verdict.name for verdict in self.verdicts if verdict.action == "keep")

    @property
    def removed(self) -> tuple[str, ...]:
        """The names of the folders that are no checkpoints any more, wholly gone or not."""
        return tuple(verdict.name for verdict in self.verdicts if verdict.action != "keep")

    @property
    def freed(self) -> int:
        """Bytes given back to the disk."""
        return sum(verdict.freed for verdict in self.verdicts) + sum(rewrite.freed for rewrite in self.rewrites)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        rewrites = [{**asdict(rewrite), "freed": rewrite.freed} for rewrite in self.rewrites]
        rest = {"kept": list(self.kept), "removed": list(self.removed), "freed": self.freed}
        return {**asdict(self), "rewrites": rewrites, **rest}


def prune(
    run: str | os.PathLike[str],
    keep_last: int | None = None,
    keep_every: int | None = None,
    keep_best: int | None = None,
    keep_within: str | timedelta | None = None,
    *,
    metrics: str | os.PathLike[str] | Mapping[int, float] | None = None,
    metric: str = METRIC,
    mode: Mode = "min",
    compact: float | bool = False,
    idle: bool = False,
    incomplete: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pruning:
    """Remove the checkpoints of a run that no rule keeps; what any of them keeps stays.

    What a save under way may need always stays: the newest checkpoint, the one before a save that
    has begun, and folders that are not committed. Files that kept checkpoints refer to stay where
    they are. Killed at any moment, no folder looks like a checkpoint that is none and every kept one is loadable; the
    next call finishes.

    Args:
        run: the run's folder.
        keep_last: keep as many, counted in the order in which they were saved.
        keep_every: keep those whose step is a multiple.
        keep_best: keep as many of the best ones by a metric.
        keep_within: keep what was saved at most so long ago: ``"12h"``, ``"7d"`` or a ``timedelta``.
        metrics: the metric of each step, or a file or URL of it (see ``metrics.read_metric``).
        metric: what it is called there.
        mode: whether its lowest values are the best (``min``), or its highest (``max``).
        compact: rewrite data files of whose bytes more than this share, between 0 and 1, is needed by no checkpoint
            that is kept; True for a half.
        idle: no save is under way; files that one could be referring to may be rewritten as well.
        incomplete: also remove what was not committed and is older than the newest checkpoint, and what other killed
            calls have left.
        dry_run: only tell what would be done.
        progress: is told how many of how many folders and files are done.

    Raises:
        PruneRefusedError: the rules make no sense, or ``run`` is no run.
        MetricsError: the metrics cannot be read.
        NoCheckpointError: the run holds no committed checkpoint.
        UnreadableMetadataError: a ``.metadata`` in the run cannot be read, so it may need any file.
        TailorError: a folder in the run cannot be listed, or something cannot be removed or rewritten.
    """
    threshold = _threshold(compact)
    rules = _rules(keep_last, keep_every, _best(keep_best, metrics, metric, mode), keep_within)
    if idle and threshold is None:
        raise PruneRefusedError("idle changes nothing but what is compacted; give compact (--compact) as well.")
    folder = _check(run, bool(rules), incomplete, threshold)
    compacts = threshold is not None
    rewritten: list[Rewrite] = []
    with compacting.alone(folder) if compacts and not dry_run else nullcontext():
        with looking_into(folder):
            if compacts and not dry_run:
                compacting.settle(folder)
            everything = [All("no rule removes it")]
            plan = make_plan(folder, rules or everything, incomplete=incomplete, compact=compacts, idle=idle)
        if not dry_run:
            _remove(folder, plan, progress)
        if threshold is not None:
            rewritten = _compacted(folder, plan, threshold, dry_run, progress)
    return Pruning(str(folder), dry_run, plan.verdicts, tuple(rewritten))


# Asking -----------------------------------------------------------------------------------


def _check(run: str | os.PathLike[str], any_rule: bool, incomplete: bool, threshold: float | None) -> Path:
    if is_url(run):
        raise PruneRefusedError(f"{os.fspath(run)} is on an object store; only local runs can be pruned.")
    folder = Path(run)
    if not folder.is_dir():
        raise NoCheckpointError(f"{folder} is no folder; name a run, whose sub-folders are its checkpoints.")
    if (folder / METADATA).exists():
        raise PruneRefusedError(f"{folder} is a checkpoint itself; name the run that it belongs to.")
    if not any_rule and not incomplete and threshold is None:
        raise PruneRefusedError(
            "No rule says what to keep; give one or more of keep_last, keep_every, keep_best and keep_within "
            "(--keep-last, --keep-every, --keep-best, --keep-within)."
        )
    return folder


def _rules(last: int | None, every: int | None, best: Best | None, within: str | timedelta | None) -> list[Rule]:
    asked: list[Rule | None] = [
        None if last is None else Last(last),
        None if every is None else Every(every),
        best,
        None if within is None else Within(span(within), time.time()),
    ]
    return [rule for rule in asked if rule is not None]


def _best(
    count: int | None, metrics: str | os.PathLike[str] | Mapping[int, float] | None, metric: str, mode: Mode
) -> Best | None:
    if count is None and metrics is None:
        if (metric, mode) != (METRIC, "min"):
            raise PruneRefusedError("metric and mode say what is best; give keep_best (--keep-best) as well.")
        return None
    if count is None:
        raise PruneRefusedError("Metrics alone keep nothing; give keep_best (--keep-best) as well.")
    if metrics is None:
        raise PruneRefusedError("keep_best wants to know what is best; give metrics (--metrics FILE) as well.")
    values = metrics if isinstance(metrics, Mapping) else read_metric(metrics, metric)
    return Best(count, metric, values, mode)


def _threshold(compact: float | bool) -> float | None:
    if isinstance(compact, bool):
        return DEAD_SHARE if compact else None
    if not 0 <= compact < 1:
        raise PruneRefusedError(f"compact={compact:g} is no share of a file; give a number from 0 up to 1.")
    return compact


# Freeing ----------------------------------------------------------------------------------


def _remove(run: Path, plan: PrunePlan, progress: Callable[[int, int], None] | None) -> None:
    """Do it: nothing looks like a checkpoint any more that loses a byte, before any of them does.

    Raises:
        TailorError: something could not be done; all else was.
    """
    failed: list[OSError] = []
    gone = _withdrawn(plan, failed)
    if not failed:  # what is a checkpoint still may need any of these
        with _noted(failed):
            free(plan.free)
    for done, (entry, spared) in enumerate(gone, 1):
        with _noted(failed):
            strip(entry, spared) if spared else remove(entry)
        if progress:
            progress(done, len(gone))
    for leftover in plan.leftovers:
        with _noted(failed):
            leftover.remove()
    if failed:
        raise _told(failed[0], run, len(failed) - 1) from failed[0]


def _withdrawn(plan: PrunePlan, failed: list[OSError]) -> list[tuple[Entry, set[Path]]]:
    """Withdraw what goes; return what is no checkpoint any more, with those of its files that stay."""
    withdrawn: list[tuple[Entry, set[Path]]] = []
    still: list[Checkpoint] = []
    for entry, spared in plan.gone:
        count = len(failed)
        with _noted(failed):
            withdraw(entry)
        if len(failed) == count:
            withdrawn.append((entry, spared))
        else:
            still += entry.checkpoints
    in_use = needed(still)
    return [(entry, spared | entry.among(in_use)) for entry, spared in withdrawn]


@contextmanager
def _noted(failed: list[OSError]) -> Iterator[None]:
    """Go on after what the file system refuses, and note it."""
    try:
        yield
    except TailorError:  # some are OSErrors as well
        raise
    except OSError as error:
        failed.append(error)


def _compacted(
    run: Path, plan: PrunePlan, threshold: float, dry_run: bool, progress: Callable[[int, int], None] | None
) -> list[Rewrite]:
    """Rewrite what is mostly dead; return what becomes of each such file.

    Raises:
        TailorError: one cannot be rewritten.
    """
    if dry_run:
        return [rewrite for _, rewrite in rewrites(survey(run, plan.users), threshold, plan.links, plan.held)]
    failed: list[OSError] = []
    found: list[Rewrite] = []
    with _noted(failed):
        if compacting.finish(run, plan.users, plan.held):
            pairs = rewrites(survey(run, plan.users), threshold, {}, plan.held)
            found = [rewrite for _, rewrite in pairs]
            files = [file for file, rewrite in pairs if rewrite.why_not is None]
            if not compacting.compact(run, files, plan.users, progress):
                found = [rewrite.waiting() for rewrite in found]
    if failed:
        raise _told(failed[0], run) from failed[0]
    return found


def _told(error: OSError, run: Path, others: int = 0) -> TailorError:
    more = f" (and {others} more)" if others else ""
    what = error.filename or run
    return TailorError(f"{what} cannot be changed: {error.strerror}{more}; the next prune goes on from here.")
