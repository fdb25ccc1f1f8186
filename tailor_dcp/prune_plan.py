"""The plan of a prune: what becomes of each folder of a run, why, and what that frees. Nothing is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tailor_dcp import compact as compacting
from tailor_dcp.amounts import counted
from tailor_dcp.census import Checkpoint, Entry, aliases, census, committed, needed
from tailor_dcp.choosing import Choice, choose
from tailor_dcp.dead_bytes import Inode
from tailor_dcp.errors import NoCheckpointError, TailorError, UnreadableMetadataError
from tailor_dcp.leftovers import COMPACTION, Leftover, find, taken
from tailor_dcp.listing import checkpoints_below
from tailor_dcp.location import METADATA, is_within
from tailor_dcp.removal import condemned, overwritten
from tailor_dcp.retention import Rule

Action = Literal["keep", "strip", "remove"]


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
class PrunePlan:
    """What is to be done.

    Attributes:
        verdicts: what is told of it.
        gone: what is removed, with those of its files that stay.
        free: files that are removed out of folders that stay.
        leftovers: what is removed that killed calls have left.
        users: the checkpoints that stay.
        links: how many names each file loses.
        held: checkpoints whose files a save under way may refer to by their names.
    """

    verdicts: tuple[Verdict, ...]
    gone: tuple[tuple[Entry, set[Path]], ...]
    free: tuple[Path, ...]
    leftovers: tuple[Leftover, ...]
    users: tuple[Checkpoint, ...]
    links: Mapping[Inode, int]
    held: frozenset[Path]


def make_plan(run: Path, rules: Sequence[Rule], *, incomplete: bool, compact: bool, idle: bool) -> PrunePlan:
    """Look at a run and say what is to be done.

    Args:
        run: the run's folder.
        rules: what any of them keeps stays.
        incomplete: whether what was not committed goes, and what killed calls have left.
        compact: whether a compaction that was cut off is to be finished.
        idle: whether no save is under way.

    Raises:
        NoCheckpointError: the run holds no committed checkpoint.
        UnreadableMetadataError: a ``.metadata`` in it cannot be read, so it may need any file.
        OSError: a folder in it cannot be listed.
    """
    left = {leftover.path: leftover for leftover in find(run)}
    found = census(run)
    dropped = [one for one in left.values() if incomplete and not one.busy and one.path.name != COMPACTION]
    working = left.keys() - {one.path for one in dropped}
    others = [*(c for entry in found if entry.folder in working for c in entry.checkpoints), *_outside(run)]
    entries = [entry for entry in found if entry.folder not in left]
    if not any(entry.checkpoints and entry.step is not None for entry in entries):
        raise NoCheckpointError(
            f"{run} holds no committed checkpoint whose folder's name tells a step; name the folder that holds "
            f"step-100, step-200 and so on."
        )
    choice = choose(entries, rules, incomplete, aliases(run), others)
    users = [*others, *(c for entry in entries if entry.folder not in choice.gone for c in entry.checkpoints)]
    in_use = needed(users)
    gone = [(entry, entry.among(in_use)) for entry in entries if entry.folder in choice.gone]
    lost = {entry.folder: [*condemned(entry, spared), *overwritten(entry, spared)] for entry, spared in gone}
    lost |= {**choice.leftovers, **{one.path: one.files() for one in dropped}}
    freed, links = _freed(lost)
    is_busy = bool(choice.busy) or any(one.busy and one.path.name != COMPACTION for one in left.values())
    held = frozenset() if idle else frozenset(user.folder for user in users if is_busy or _refers(user, choice))
    waits = compacting.waits(run, users, held) if compact else "--compact finishes it"
    verdicts = [
        *(_of_gone(entry, spared, choice, users, freed[entry.folder]) for entry, spared in gone),
        *(_of_kept(entry, choice, freed) for entry in entries if entry.folder in choice.kept),
        *(_of_leftover(one, incomplete, waits, freed) for one in left.values()),
    ]
    return PrunePlan(
        verdicts=tuple(sorted(verdicts, key=lambda verdict: (verdict.step is None, verdict.step or 0, verdict.name))),
        gone=tuple(gone),
        free=tuple(path for paths in choice.leftovers.values() for path in paths),
        leftovers=tuple(dropped),
        users=tuple(users),
        links=links,
        held=held,
    )


@contextmanager
def looking_into(run: Path) -> Iterator[None]:
    """Say what to do about what cannot be seen: nothing is removed that it may need."""
    try:
        yield
    except UnreadableMetadataError as error:
        problem = str(error).rpartition("; ")[0] or str(error).rstrip(".")
        raise UnreadableMetadataError(
            f"{problem}. It may need any file of the run: make it readable, repair it (`tailor verify --repair-plan`), "
            f"or move its folder out of the run."
        ) from error
    except TailorError:  # some are OSErrors as well
        raise
    except OSError as error:
        raise _unseen(f"{error.filename or run} could not be looked into: {error.strerror}") from error


def _outside(run: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints that symbolic links of a run lead to, out of it: they may refer to what is in it."""
    found = checkpoints_below(run)
    for folder, why in found.unlisted:
        raise _unseen(f"{folder} {why}")
    yield from committed(folder / METADATA for folder in found.folders if not is_within(folder, run))


def _unseen(what: str) -> TailorError:
    return TailorError(
        f"{what}. A checkpoint in it may need any file of the run: make it readable, or move it out of the run."
    )


def _refers(user: Checkpoint, choice: Choice) -> bool:
    """Tell whether a save that has only been planned may refer to this checkpoint's files by their names."""
    return user.carry == "reference" and any(user.folder.is_relative_to(folder) for folder in choice.sources)


def _freed(lost: Mapping[Path, Iterable[Path]]) -> tuple[dict[Path, int], Counter[Inode]]:
    """Return what each folder frees that loses files, one after the other, and how many names each file loses.

    The last of a file's names frees its bytes, and nothing while there are others.
    """
    links: Counter[Inode] = Counter()
    freed = dict.fromkeys(lost, 0)
    for folder, paths in lost.items():
        for path in paths:
            try:
                status = path.lstat()
            except FileNotFoundError:  # somebody else removes it as well
                continue
            inode = (status.st_dev, status.st_ino)
            links[inode] += 1
            freed[folder] += status.st_size if links[inode] == status.st_nlink else 0
    return freed, links


def _of_gone(entry: Entry, spared: set[Path], choice: Choice, users: Iterable[Checkpoint], freed: int) -> Verdict:
    why = choice.gone[entry.folder] + _referring(entry, spared, users)
    size, _ = taken(entry.folder)
    return Verdict(entry.name, entry.step, "strip" if spared else "remove", tuple(why), freed, size)


def _of_kept(entry: Entry, choice: Choice, freed: Mapping[Path, int]) -> Verdict:
    left, why = choice.leftovers.get(entry.folder, []), choice.kept[entry.folder]
    if left:
        why = [*why, f"{counted(len(left), 'file')} in it that no checkpoint needs any more"]
    size, written = taken(entry.folder)
    open_since = None if entry.checkpoints else written
    return Verdict(entry.name, entry.step, "keep", tuple(why), freed.get(entry.folder, 0), size, open_since)


def _of_leftover(one: Leftover, incomplete: bool, waits: str | None, freed: Mapping[Path, int]) -> Verdict:
    action: Action = "keep"
    if one.path.name == COMPACTION:
        why = "a compaction was cut off" + ("" if waits is None else f": {waits}")
        action = "remove" if waits is None else "keep"
    elif one.busy:
        why = f"{one.what} is at work on it"
    else:
        why = f"left by {one.what}, which was cut off" + ("" if incomplete else ": --incomplete removes it")
        action = "remove" if incomplete else "keep"
    return Verdict(one.path.name, None, action, (why,), freed.get(one.path, 0), one.bytes, one.written)


def _referring(entry: Entry, spared: set[Path], users: Iterable[Checkpoint]) -> list[str]:
    if not spared:
        return []
    run = entry.folder.parent
    real = {real for real, path in entry.real.items() if path in spared}
    names = [user.folder.relative_to(run).as_posix() for user in users if real & user.files]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{names[0]}{more} refers to {len(spared)} of its files, which stay"]
