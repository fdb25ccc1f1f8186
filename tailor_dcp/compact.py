"""Compacting: giving back what files hold that no checkpoint of a run needs any more.

A file is written anew with its live blobs under another name, every checkpoint that needs it is pointed to that, and
only then the old one goes. What is to be done is on the disk as a plan before the first checkpoint is touched: a call
that is killed leaves all of them loadable, by the old names or by the new ones, and the next one goes on from there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from tailor_dcp.carry import sync_folder
from tailor_dcp.census import Checkpoint, census, walk
from tailor_dcp.compact_plan import Move, Plan, read_plan, write_plan
from tailor_dcp.dead_bytes import DATA_FILE, DataFile
from tailor_dcp.errors import TailorError
from tailor_dcp.leftovers import COMPACTION
from tailor_dcp.location import METADATA, locate
from tailor_dcp.locks import Lock
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.permissions import can_restore, can_write
from tailor_dcp.ranges import copy_range
from tailor_dcp.repointing import in_run, repoint, unchanged
from tailor_dcp.staging import batches

_BATCH = 32 << 30
"""Bytes that are written before the files that they replace go."""
_PIECE = 8 << 20


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Let no other compaction of this run work at the same time.

    Raises:
        TailorError: another does.
    """
    lock = Lock(
        run / f"{COMPACTION}.lock", TailorError(f"Another call is compacting {run}; wait for it, then prune again.")
    )
    lock.take()
    try:
        yield
    finally:
        lock.release()


def settle(run: Path) -> None:
    """Undo what makes a compaction that was cut off look like a save that carries files into a checkpoint.

    It was at work in one folder of carried files, which is younger now than its checkpoint although nothing is in it
    but what that names, or will.
    """
    plan = None if (run / COMPACTION).is_symlink() else read_plan(run / COMPACTION)
    if plan is None:
        return
    new = {move.new for move in plan.moves}
    young = [pair for entry in census(run) for pair in entry.younger]
    for folder, home in young if len(young) == 1 else ():
        names = {path.name for path in folder.iterdir()}
        named = {Path(file).name for file in home.files if Path(file).parent.name == folder.name}
        if names & new and names <= {*new, *named} and can_restore(folder):
            written = (home.folder / METADATA).stat().st_mtime_ns
            os.utime(folder, ns=(written, written))


def waits(run: Path, users: Sequence[Checkpoint], may_be_referred_to: Set[Path]) -> str | None:
    """Return why a compaction that was cut off cannot be finished now, None if it can or there is none.

    Args:
        run: the run's folder.
        users: all checkpoints of the run.
        may_be_referred_to: the checkpoints whose files a save under way may refer to by their names.
    """
    stage = run / COMPACTION
    if stage.is_symlink() or not stage.exists():
        return None
    if not can_write(stage):
        return "it is another user's, who alone can finish it"
    plan = read_plan(stage)
    old = {name for move in plan.moves for name in move.old if in_run(run / name, run) == name} if plan else set()
    concerned = [user.folder for user in users if old & _names(user, run)]
    if not may_be_referred_to.isdisjoint(concerned):
        return "a save under way may refer to its files (--idle says that none is)"
    folders = {*concerned, *((run / name).parent for name in old)}
    locked = next((folder for folder in sorted(folders) if folder.exists() and not can_restore(folder)), None)
    return None if locked is None else f"{locked} is read-only, or another user's, who alone can finish it"


def finish(run: Path, users: Sequence[Checkpoint], may_be_referred_to: Set[Path]) -> bool:
    """Go on with a compaction that was cut off, or remove what it had not finished writing.

    Args:
        run: the run's folder.
        users: all checkpoints of the run.
        may_be_referred_to: the checkpoints whose files a save under way may refer to by their names.

    Returns:
        Whether nothing is left of it; it must wait where a save under way may refer to a file that would go.
    """
    stage = run / COMPACTION
    if stage.is_symlink():  # none that was made here
        stage.unlink()
    if waits(run, users, may_be_referred_to) is not None:
        return False
    plan = read_plan(stage)
    if plan is not None:
        plan = Plan(moves=tuple(move for move in plan.moves if _is_sound(move, run, stage)))
        _apply(run, plan, users)
    shutil.rmtree(stage, ignore_errors=True)
    return True


def compact(
    run: Path,
    files: Sequence[DataFile],
    users: Sequence[Checkpoint],
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Rewrite files.

    Args:
        run: the run's folder.
        files: what ``rewrites`` found.
        users: all checkpoints of the run.
        progress: is told how many of how many files are done.

    Returns:
        Whether all old files are gone; not if a save has begun meanwhile.

    Raises:
        OSError: one cannot be written; the next call goes on.
    """
    stage, done, freed = run / COMPACTION, 0, True
    for batch in batches(files, _BATCH, lambda file: file.needed):
        stage.mkdir()
        plan = Plan(moves=tuple(_write(run, stage, file) for file in batch))
        sync_folder(stage)
        write_plan(plan, stage)
        freed &= _apply(run, plan, users)
        shutil.rmtree(stage)
        done += len(batch)
        if progress:
            progress(done, len(files))
    return freed


def _write(run: Path, stage: Path, file: DataFile) -> Move:
    """Write a file's live bytes in their order, one behind the other."""
    old, live = sorted(file.names), sorted(file.live)
    named = DATA_FILE.fullmatch(Path(old[0]).name)
    assert named is not None
    # The id of the save that wrote the bytes stays in the name: sweeps go by it, and so does telling leftovers.
    new = f"{named[1]}-{secrets.token_hex(4)}.distcp"
    with (run / old[0]).open("rb") as source, (stage / new).open("xb") as target:
        for offset, length in live:
            copy_range(source.fileno(), target.fileno(), offset, length)
        # What was written long ago must not look as if a save were writing it.
        with suppress(OSError):  # not every file system has permissions
            os.fchmod(target.fileno(), stat.S_IMODE(file.status.st_mode))
        os.utime(target.fileno(), ns=(file.status.st_atime_ns, file.status.st_mtime_ns))
        os.fsync(target.fileno())
    return Move(new=new, old=tuple(old), live=tuple(live))


def _apply(run: Path, plan: Plan, users: Sequence[Checkpoint]) -> bool:
    """Point all checkpoints to the new files, then remove the old ones; tell whether that could be done."""
    before = _times(run)
    for user in users:
        repoint(user.folder, run, run / COMPACTION, plan)
    if _times(run) != before:
        # A save that has begun meanwhile may be linking what it is about to carry. Nothing names the old files any
        # more, so the next prune removes them.
        return False
    in_use = {name for user in users for name in _names(user, run)}
    for path in (run / name for move in plan.moves for name in move.old if name not in in_use):
        if path.parent.is_dir():
            with unchanged(path.parent):
                path.unlink(missing_ok=True)
    return True


def _names(user: Checkpoint, run: Path) -> set[str | None]:
    names = {info.relative_path for info in read(user.folder / METADATA).storage_data.values()}
    return {in_run(user.folder / name, run) for name in names}


def _is_sound(move: Move, run: Path, stage: Path) -> bool:
    """Tell whether a move that was found on the disk stays in the run, and its new file holds what the old one does."""
    old = [run / name for name in move.old]
    if any(in_run(path, run) != name or path.is_symlink() for path, name in zip(old, move.old, strict=True)):
        return False
    if (stage / move.new).is_symlink():
        return False
    try:
        with (stage / move.new).open("rb") as new:
            return all(_holds_the_same(move, new.fileno(), path) for path in old if path.exists())
    except OSError:
        return False


def _holds_the_same(move: Move, new: int, path: Path) -> bool:
    with path.open("rb") as stream:
        return all(_are_equal(stream.fileno(), offset, new, at, length) for (offset, length), at in move.places.items())


def _are_equal(one: int, at_one: int, other: int, at_other: int, length: int) -> bool:
    for start in range(0, length, _PIECE):
        count = min(_PIECE, length - start)
        data = os.pread(one, count, at_one + start)
        if len(data) != count or data != os.pread(other, count, at_other + start):
            return False
    return True


def _times(run: Path) -> dict[Path, int]:
    """Return when anything was last put into each folder that saves or other calls write to, or taken out of it."""
    tops = [path for path in run.iterdir() if path.is_dir() and path.name != COMPACTION]
    times = {}
    for top in tops:
        if top.name.startswith(".") or locate(top).step is not None:  # others are logs and the like
            for folder, _ in walk(top):
                with suppress(OSError):  # removed just now
                    times[folder] = folder.stat().st_mtime_ns
    return times
