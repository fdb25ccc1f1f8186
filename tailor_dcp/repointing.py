"""Re-pointing: letting a committed checkpoint name other files that hold the same blobs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.carry import copy_file, sync_folder
from tailor_dcp.commit import commit
from tailor_dcp.compact_plan import Move, Plan
from tailor_dcp.location import METADATA
from tailor_dcp.locks import alone_in
from tailor_dcp.metadata.digest import digest
from tailor_dcp.metadata.record import ATTRIBUTE, DIGEST, Sums, packed
from tailor_dcp.metadata.safe_pickle import read

_GROWING = f"{METADATA}.partial"
"""Not what a save calls its own, from which prune tells that one is under way."""


def repoint(folder: Path, run: Path, stage: Path, plan: Plan) -> None:
    """Let a checkpoint name the new files of a plan instead of the old ones.

    It stays what it was in every other respect: its record, the time of its ``.metadata``, the times of its folders.

    Args:
        folder: the checkpoint's.
        run: its run's.
        stage: where the new files lie.
        plan: which they are.
    """
    with alone_in(folder):  # a save into it that commits between reading and writing would be undone
        path = folder / METADATA
        written = path.stat().st_mtime_ns
        metadata = read(path)
        moves = _moves(metadata, folder, run, plan)
        if not moves:
            return
        for name, move in moves.items():
            _put(stage / move.new, folder / _renamed(name, move))
        signed = _is_intact(metadata)
        _point(metadata, moves)
        with unchanged(folder):
            commit(metadata, folder, written, _GROWING, signed)


def in_run(path: Path, run: Path) -> str | None:
    """Return a file's path relative to the run, folders resolved; None if it lies outside."""
    real = Path(os.path.realpath(path.parent)) / path.name
    root = Path(os.path.realpath(run))
    return real.relative_to(root).as_posix() if real.is_relative_to(root) else None


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Let a folder look as old as before: prune tells from its time whether a save has begun in it."""
    status = folder.stat()
    yield
    sync_folder(folder)
    os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))


def _moves(metadata: Metadata, folder: Path, run: Path, plan: Plan) -> dict[str, Move]:
    """Return the moves of the files that a checkpoint names, if all that it needs of them has moved."""
    by_old = {old: move for move in plan.moves for old in move.old}
    needed: dict[str, set[tuple[int, int]]] = {}
    for info in metadata.storage_data.values():
        needed.setdefault(info.relative_path, set()).add((info.offset, info.length))
    found = {name: by_old.get(in_run(folder / name, run) or "") for name in needed}
    return {name: move for name, move in found.items() if move is not None and needed[name] <= move.places.keys()}


def _renamed(name: str, move: Move) -> str:
    return PurePosixPath(name).with_name(move.new).as_posix()


def _put(new: Path, target: Path) -> None:
    """Give a new file a name beside the old one's."""
    with unchanged(target.parent):
        try:
            target.hardlink_to(new)
        except FileExistsError:  # several checkpoints refer to one file, or an earlier call was killed
            if os.path.samestat(target.lstat(), new.lstat()):
                return
            copy_file(new, target)
        except OSError:  # here are no links, so there is one name only
            copy_file(new, target)


def _is_intact(metadata: Metadata) -> bool:
    """Tell whether metadata is known to be what was written: else nothing may say so of it from now on."""
    told = getattr(metadata, ATTRIBUTE, {}).get(DIGEST)
    return told is not None and digest(metadata) == told


def _point(metadata: Metadata, moves: Mapping[str, Move]) -> None:
    for index, info in metadata.storage_data.items():
        move = moves.get(info.relative_path)
        if move is not None:
            at = move.places[info.offset, info.length]
            # Several entries may share one object.
            metadata.storage_data[index] = replace(info, relative_path=_renamed(info.relative_path, move), offset=at)
    record = getattr(metadata, ATTRIBUTE, None)
    if record is not None:
        crcs = record["crcs"]
        for name, move in moves.items():
            if name in crcs:
                crcs[_renamed(name, move)] = _moved(crcs.pop(name), move)


def _moved(blobs: bytes | dict[int, int], move: Move) -> bytes | dict[int, int]:
    """Return the checksums of the blobs that have moved, by their new places, in the form that they had."""
    known = Sums(blobs) if isinstance(blobs, bytes) else blobs
    moved = {at: known[offset] for (offset, _), at in move.places.items() if offset in known}
    return packed(moved) if isinstance(blobs, bytes) else moved
