"""Pruning: which checkpoints of a run to keep and why, and removing the others without freeing a byte in use."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tailor_dcp.census import Checkpoint, Entry, aliases, census, needed
from tailor_dcp.errors import NoCheckpointError, TailorError
from tailor_dcp.location import METADATA, is_url
from tailor_dcp.removal import condemned, remove, strip, withdraw

Action = Literal["keep", "strip", "remove"]
Why = dict[Path, list[str]]


class PruneRefusedError(TailorError, ValueError):
    """What is asked for does not make sense, or would endanger what it should keep."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of one folder of a run.

    Attributes:
        name: the folder's name.
        step: its step, None if its name tells none.
        action: ``keep``; ``remove``; or ``strip``, if it is no checkpoint any more but those of its
            files stay that kept checkpoints refer to.
        why: the reasons.
        freed: bytes that its removal gives back to the disk; what has other links is not freed.
    """

    name: str
    step: int | None
    action: Action
    why: tuple[str, ...]
    freed: int


@dataclass(frozen=True)
class Pruning:
    """What ``prune`` did, or with ``dry_run`` would do.

    Attributes:
        run: the run's folder.
        dry_run: whether nothing was touched.
        verdicts: one for each folder that holds a checkpoint or a part of one.
    """

    run: str
    dry_run: bool
    verdicts: tuple[Verdict, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of the folders that stay checkpoints."""
        return tuple(verdict.name for verdict in self.verdicts if verdict.action == "keep")

    @property
    def removed(self) -> tuple[str, ...]:
        """The names of the folders that are no checkpoints any more, wholly gone or not."""
        return tuple(verdict.name for verdict in self.verdicts if verdict.action != "keep")

    @property
    def freed(self) -> int:
        """Bytes given back to the disk."""
        return sum(verdict.freed for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain builtins, for ``--json``."""
        return {**asdict(self), "kept": list(self.kept), "removed": list(self.removed), "freed": self.freed}


def prune(
    run: str | os.PathLike[str],
    keep_last: int | None = None,
    keep_every: int | None = None,
    dry_run: bool = False,
    incomplete: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Pruning:
    """Remove the checkpoints of a run that no rule keeps.

    What a save under way may need always stays: the newest checkpoint, the one before a save that
    has begun, and folders that are not committed. Files that kept checkpoints refer to stay where
    they are. Killed at any moment, no folder looks like a checkpoint that is none; the next call
    finishes.

    Args:
        run: the run's folder.
        keep_last: keep as many, counted in the order in which they were saved.
        keep_every: keep those whose step is a multiple.
        dry_run: only tell what would be done.
        incomplete: also remove what was not committed and is older than the newest checkpoint.
        progress: is told how many of how many folders are done.

    Raises:
        PruneRefusedError: the rules make no sense, or ``run`` is no run.
        NoCheckpointError: the run holds no committed checkpoint.
        UnreadableMetadataError: a ``.metadata`` in the run cannot be read, so it may need any file.
        TailorError: a folder cannot be removed.
    """
    folder = _check(run, keep_last, keep_every, incomplete)
    entries = census(folder)
    if not any(entry.checkpoints and entry.step is not None for entry in entries):
        raise NoCheckpointError(
            f"{folder} holds no committed checkpoint whose folder's name tells a step; name the folder that holds "
            f"step-100, step-200 and so on."
        )
    choice = _choose(entries, keep_last, keep_every, incomplete, aliases(folder))
    verdicts, plan = _judge(entries, choice)
    if not dry_run:
        _execute(plan, progress)
    return Pruning(str(folder), dry_run, tuple(verdicts))


def _execute(plan: list[tuple[Entry, set[Path]]], progress: Callable[[int, int], None] | None) -> None:
    entry = None
    try:
        for entry, _ in plan:
            withdraw(entry)
        for done, (entry, spared) in enumerate(plan):
            strip(entry, spared) if spared else remove(entry)
            if progress:
                progress(done + 1, len(plan))
    except OSError as error:
        what = error.filename or (entry and entry.folder)
        raise TailorError(f"{what} cannot be removed: {error.strerror}; the next prune goes on from here.") from error


def _check(run: str | os.PathLike[str], keep_last: int | None, keep_every: int | None, incomplete: bool) -> Path:
    if is_url(run):
        raise PruneRefusedError(f"{os.fspath(run)} is on an object store; only local runs can be pruned.")
    folder = Path(run)
    if not folder.is_dir():
        raise NoCheckpointError(f"{folder} is no folder; name a run, whose sub-folders are its checkpoints.")
    if (folder / METADATA).exists():
        raise PruneRefusedError(f"{folder} is a checkpoint itself; name the run that it belongs to.")
    for name, number in (("keep_last", keep_last), ("keep_every", keep_every)):
        if number is not None and number < 1:
            raise PruneRefusedError(f"{name}={number} keeps nothing; give 1 or more.")
    if keep_last is None and keep_every is None and not incomplete:
        raise PruneRefusedError(
            "No rule says what to keep; give keep_last, keep_every or both (--keep-last, --keep-every)."
        )
    return folder


# Choosing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    kept: Why
    gone: Why


def _choose(
    entries: list[Entry], last: int | None, every: int | None, incomplete: bool, links: dict[str, list[str]]
) -> _Choice:
    """Say of each folder why it is kept, or why it is not."""
    named = needed(c for entry in entries for c in (*entry.checkpoints, *entry.stripped))
    loose = {entry.folder: entry.loose(named) for entry in entries}
    committed = [e for e in entries if e.checkpoints and e.step is not None]
    newest = max(c.changed for e in committed for c in e.checkpoints)
    broken = [e for e in entries if e.step is not None and _unfinished(e, loose[e.folder])]
    busy = [
        e
        for e in entries
        if e.step is not None and (e in broken or loose[e.folder]) and e.touched(loose[e.folder]) >= newest
    ]
    halves = [e for e in entries if e not in broken and e.half_withdrawn]
    whole = sorted((e for e in committed if e not in broken and e not in halves), key=lambda e: e.time)

    kept: defaultdict[Path, list[str]] = defaultdict(list)
    _by_rules(kept, whole, last, every)
    _for_saves(kept, committed, whole, busy)
    for entry in entries:
        for name in links.get(os.path.realpath(entry.folder), ()):
            kept[entry.folder].append(f"{name} leads to it")
        if entry.step is None and entry.checkpoints:
            kept[entry.folder].append("no step in its name")
    gone: Why = {}
    for entry in broken:
        if entry in busy or not incomplete:
            kept[entry.folder].append("not committed: a save may be writing it")
        else:
            gone[entry.folder] = ["not committed, and older than the newest checkpoint"]
    for entry in entries:
        if entry.doomed or entry in halves:
            gone[entry.folder] = ["an earlier prune was cut off in it"]
        elif entry.stripped and not entry.checkpoints and entry not in broken:
            gone[entry.folder] = ["no checkpoint any more since an earlier prune"]
    for entry in whole:
        gone[entry.folder] = ["no rule keeps it"]
    return _Choice(dict(kept), {folder: why for folder, why in gone.items() if folder not in kept})


def _unfinished(entry: Entry, loose: list[Path]) -> bool:
    if entry.doomed or any(path.name.endswith(METADATA) and path.name != METADATA for path in entry.files):
        return False  # saved without collectives: every rank has a metadata file of its own
    return entry.unfinished(loose)


def _by_rules(kept: Why, whole: list[Entry], last: int | None, every: int | None) -> None:
    if last is not None:
        why = "the last one" if last == 1 else f"one of the last {last}"
        for entry in whole[-last:]:
            kept[entry.folder].append(why)
    if every is not None:
        for entry in whole:
            if entry.step is not None and entry.step % every == 0:
                kept[entry.folder].append(f"every {every} steps")
    if last is None and every is None:
        for entry in whole:
            kept[entry.folder].append("only what is not committed is removed")


def _for_saves(kept: Why, committed: list[Entry], whole: list[Entry], busy: list[Entry]) -> None:
    """Keep what a save under way carries from, or writes into."""
    newest: dict[str, tuple[float, Entry]] = {}
    for entry in committed:
        for checkpoint in entry.checkpoints:
            series = checkpoint.folder.relative_to(entry.folder).as_posix()
            newest[series] = max(newest.get(series, (0.0, entry)), (checkpoint.time, entry), key=lambda item: item[0])
    for folder in {entry.folder for _, entry in newest.values()}:
        kept[folder].append("the newest: a save may be carrying from it")
    for entry in busy:
        if entry in whole:
            kept[entry.folder].append("a save may be writing into it again")
        # A run that went back carries from what lies before the new save, which need not be the newest.
        before = [e for e in whole if (e.step or 0) < (entry.step or 0)]
        if before:
            base = max(before, key=lambda e: e.step or 0)
            kept[base.folder].append(f"the save into {entry.name} may be carrying from it")


# Judging ----------------------------------------------------------------------------------


def _judge(entries: list[Entry], choice: _Choice) -> tuple[list[Verdict], list[tuple[Entry, set[Path]]]]:
    """Return the verdicts, and what is to be removed with those of its files that stay."""
    users = [c for entry in entries if entry.folder not in choice.gone for c in entry.checkpoints]
    in_use = needed(users)
    links: Counter[tuple[int, int]] = Counter()
    verdicts, plan = [], []
    for entry in entries:
        if entry.folder in choice.gone:
            spared = {path for real, path in entry.real.items() if real in in_use}
            why = choice.gone[entry.folder] + _referring(entry, spared, users)
            freed = sum(_freed(path, links) for path in condemned(entry, spared))
            verdicts.append(Verdict(entry.name, entry.step, "strip" if spared else "remove", tuple(why), freed))
            plan.append((entry, spared))
        elif entry.folder in choice.kept:
            verdicts.append(Verdict(entry.name, entry.step, "keep", tuple(choice.kept[entry.folder]), 0))
    return sorted(verdicts, key=lambda verdict: (verdict.step is None, verdict.step or 0, verdict.name)), plan


def _referring(entry: Entry, spared: set[Path], users: Iterable[Checkpoint]) -> list[str]:
    if not spared:
        return []
    run = entry.folder.parent
    real = {real for real, path in entry.real.items() if path in spared}
    names = [user.folder.relative_to(run).as_posix() for user in users if real & user.files]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]}{more} refers to {len(spared)} of its files, which stay"]


def _freed(path: Path, links: Counter[tuple[int, int]]) -> int:
    """Count one link less; return the bytes that this frees, 0 while there are others."""
    try:
        status = path.lstat()
    except FileNotFoundError:  # somebody else removes it as well
        return 0
    inode = (status.st_dev, status.st_ino)
    links[inode] += 1
    return status.st_size if links[inode] == status.st_nlink else 0
