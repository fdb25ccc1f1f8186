"""Pruning: removing the checkpoints of a run that no rule keeps, without freeing a byte in use.

Choosing (``choosing``, by the rules of ``retention``) is apart from freeing: what is chosen is told with its reasons,
and a dry run ends there.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from tailor_dcp import compact as compacting
from tailor_dcp.amounts import counted
from tailor_dcp.census import Checkpoint, Entry, aliases, census, needed, outside
from tailor_dcp.choosing import Choice, choose
from tailor_dcp.dead_bytes import DataFile, Inode, Rewrite, rewrites, survey
from tailor_dcp.errors import NoCheckpointError, TailorError
from tailor_dcp.leftovers import COMPACTION, Leftover, taken
from tailor_dcp.leftovers import find as find_leftovers
from tailor_dcp.location import METADATA, is_url
from tailor_dcp.metrics import read_metric
from tailor_dcp.removal import condemned, free, remove, strip, withdraw
from tailor_dcp.retention import All, Best, Every, Last, Mode, PruneRefusedError, Rule, Within, span

__all__ = ["PruneRefusedError", "Pruning", "Rewrite", "Verdict", "prune"]

Action = Literal["keep", "strip", "remove"]
DEAD_SHARE = 0.5
"""The share of a file that may be dead before it is rewritten, where nobody says otherwise."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one folder of a run.

    Attributes:
        name: the folder's name, or a file's.
        step: its step, None if its name tells none.
        action: ``keep``; ``remove``; or ``strip``, if it is no checkpoint any more but those of its
            files stay that kept checkpoints refer to.
        why: the reasons, all of them.
        freed: bytes that are given back to the disk; what has other links is not freed.
        bytes: what all its files take together, also those that other folders have links to.
        written: when it was last written to, seconds since the epoch; None for committed checkpoints.
    """

    name: str
    step: int | None
    action: Action
    why: tuple[str, ...]
    freed: int
    bytes: int
    written: float | None = None


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
    metric: str = "eval_loss",
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
        TailorError: something cannot be removed or rewritten.
    """
    threshold = _threshold(compact)
    rules = _rules(keep_last, keep_every, _best(keep_best, metrics, metric, mode), keep_within)
    folder = _check(run, bool(rules), incomplete, threshold)
    alone = compacting.alone(folder) if threshold is not None and not dry_run else nullcontext()
    with alone:
        plan = _plan(folder, rules or [All("no rule removes it")], incomplete, threshold is not None, idle)
        if dry_run and threshold is not None:
            plan.rewrites = rewrites(survey(folder, plan.users), threshold, plan.links, plan.held)
        elif not dry_run:
            _execute(plan, threshold, progress)
    return Pruning(str(folder), dry_run, tuple(plan.verdicts), tuple(rewrite for _, rewrite in plan.rewrites))


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


# Judging ----------------------------------------------------------------------------------


@dataclass
class _Plan:
    """What is to be done.

    Attributes:
        run: the run's folder.
        verdicts: what is told of it.
        gone: what is removed, with those of its files that stay.
        free: files that are removed out of folders that stay.
        leftovers: what is removed that killed calls have left.
        users: the checkpoints that stay.
        links: how many names each file loses.
        held: checkpoints whose files a save under way may refer to by their names.
        rewrites: files that are mostly dead.
    """

    run: Path
    verdicts: list[Verdict] = field(default_factory=list)
    gone: list[tuple[Entry, set[Path]]] = field(default_factory=list)
    free: list[Path] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    users: list[Checkpoint] = field(default_factory=list)
    links: Counter[Inode] = field(default_factory=Counter)
    held: set[Path] = field(default_factory=set)
    rewrites: list[tuple[DataFile, Rewrite]] = field(default_factory=list)


def _plan(run: Path, rules: Sequence[Rule], incomplete: bool, compact: bool, idle: bool) -> _Plan:
    left = {leftover.path: leftover for leftover in find_leftovers(run)}
    found = census(run)
    plan = _Plan(run)
    plan.leftovers = [one for one in left.values() if incomplete and not one.busy and one.path.name != COMPACTION]
    going = {leftover.path for leftover in plan.leftovers}
    plan.users = [c for entry in found if entry.folder in left and entry.folder not in going for c in entry.checkpoints]
    plan.users += outside(run)
    entries = [entry for entry in found if entry.folder not in left]
    if not any(entry.checkpoints and entry.step is not None for entry in entries):
        raise NoCheckpointError(
            f"{run} holds no committed checkpoint whose folder's name tells a step; name the folder that holds "
            f"step-100, step-200 and so on."
        )
    choice = choose(entries, rules, incomplete, aliases(run), plan.users)
    plan.users += [c for entry in entries if entry.folder not in choice.gone for c in entry.checkpoints]
    _judge(entries, choice, plan)
    plan.verdicts += [_of_leftover(leftover, incomplete, compact, plan.links) for leftover in left.values()]
    plan.verdicts.sort(key=lambda verdict: (verdict.step is None, verdict.step or 0, verdict.name))
    is_busy = bool(choice.busy) or any(one.busy and one.path.name != COMPACTION for one in left.values())
    plan.held = set() if idle else {user.folder for user in plan.users if is_busy or _refers(user, choice)}
    return plan


def _refers(user: Checkpoint, choice: Choice) -> bool:
    """Tell whether a save that has only been planned may refer to this checkpoint's files by their names."""
    return user.carry == "reference" and any(user.folder.is_relative_to(folder) for folder in choice.sources)


def _judge(entries: list[Entry], choice: Choice, plan: _Plan) -> None:
    """Add the verdicts, and what is to be removed."""
    in_use = needed(plan.users)
    for entry in entries:
        size, written = taken(entry.folder)
        if entry.folder in choice.gone:
            spared = {path for real, path in entry.real.items() if real in in_use}
            why = choice.gone[entry.folder] + _referring(entry, spared, plan.users)
            freed = sum(_freed(path, plan.links) for path in condemned(entry, spared))
            plan.verdicts.append(
                Verdict(entry.name, entry.step, "strip" if spared else "remove", tuple(why), freed, size)
            )
            plan.gone.append((entry, spared))
        elif entry.folder in choice.kept:
            left, why = choice.leftovers.get(entry.folder, []), choice.kept[entry.folder]
            plan.free += left
            if left:
                why = [*why, f"{counted(len(left), 'file')} in it that no checkpoint needs any more"]
            freed = sum(_freed(path, plan.links) for path in left)
            open_since = None if entry.checkpoints else written
            plan.verdicts.append(Verdict(entry.name, entry.step, "keep", tuple(why), freed, size, open_since))


def _of_leftover(leftover: Leftover, incomplete: bool, compact: bool, links: Counter[Inode]) -> Verdict:
    name, action, freed = leftover.path.name, "keep", 0
    if name == COMPACTION:
        why = "a compaction was cut off: --compact finishes it"
        action = "remove" if compact else "keep"
    elif leftover.busy:
        why = f"{leftover.what} is at work on it"
    else:
        why = f"left by {leftover.what}, which was cut off" + ("" if incomplete else ": --incomplete removes it")
        if incomplete:
            action, freed = "remove", sum(_freed(path, links) for path in leftover.files())
    return Verdict(name, None, action, (why,), freed, leftover.bytes, leftover.written)  # type: ignore[arg-type]


def _referring(entry: Entry, spared: set[Path], users: Iterable[Checkpoint]) -> list[str]:
    if not spared:
        return []
    run = entry.folder.parent
    real = {real for real, path in entry.real.items() if path in spared}
    names = [user.folder.relative_to(run).as_posix() for user in users if real & user.files]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]}{more} refers to {len(spared)} of its files, which stay"]


def _freed(path: Path, links: Counter[Inode]) -> int:
    """Count one link less; return the bytes that this frees, 0 while there are others."""
    try:
        status = path.lstat()
    except FileNotFoundError:  # somebody else removes it as well
        return 0
    inode = (status.st_dev, status.st_ino)
    links[inode] += 1
    return status.st_size if links[inode] == status.st_nlink else 0


# Freeing ----------------------------------------------------------------------------------


def _execute(plan: _Plan, threshold: float | None, progress: Callable[[int, int], None] | None) -> None:
    """Do it: nothing looks like a checkpoint any more that loses a byte, before any of them does."""
    try:
        for entry, _ in plan.gone:
            withdraw(entry)
        free(plan.free)
        for done, (entry, spared) in enumerate(plan.gone, 1):
            strip(entry, spared) if spared else remove(entry)
            if progress:
                progress(done, len(plan.gone))
        for leftover in plan.leftovers:
            leftover.remove()
        if threshold is not None and compacting.finish(plan.run, plan.users, plan.held):
            plan.rewrites = rewrites(survey(plan.run, plan.users), threshold, {}, plan.held)
            files = [file for file, rewrite in plan.rewrites if rewrite.why_not is None]
            if not compacting.compact(plan.run, files, plan.users, progress):
                plan.rewrites = [(file, rewrite.waiting()) for file, rewrite in plan.rewrites]
    except OSError as error:
        if isinstance(error, TailorError):
            raise
        what = error.filename or plan.run
        raise TailorError(f"{what} cannot be changed: {error.strerror}; the next prune goes on from here.") from error
