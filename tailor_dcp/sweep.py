"""Sweeping: removing the files of earlier saves into a folder once a new save is committed there."""

from __future__ import annotations

import os
import re
import threading
from contextlib import nullcontext, suppress
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp import dcp_events
from tailor_dcp.base import open_base
from tailor_dcp.carry import CARRIED, folders_in, prune_empty
from tailor_dcp.errors import TailorError
from tailor_dcp.listing import checkpoints_below
from tailor_dcp.location import METADATA, Location, locate, real, same_folder
from tailor_dcp.locks import alone_in
from tailor_dcp.metadata.record import save_id_of
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.stores import is_remote

_DATA_FILE = re.compile(r"__\d+_.*\.distcp")

_lock = threading.Lock()
_pending: dict[str, tuple[Location, set[str], str]] = {}


def leftovers(folder: Path) -> set[str]:
    """Return the data files that lie in a folder before a save into it begins, by relative path."""
    own = {path.name for path in folder.glob("*.distcp") if _DATA_FILE.fullmatch(path.name)}
    carried = (path for home in folders_in(folder / CARRIED) for path in home.glob("*"))
    return own | {path.relative_to(folder).as_posix() for path in carried}


def after_commit(location: Location, old: set[str], save_id: str) -> None:
    """Remove ``old`` files as soon as DCP says that the save of this id is committed, never before."""
    if old:
        with _lock:
            _pending[str(location.folder)] = (location, old, save_id)


def referring_files(location: Location) -> set[Path]:
    """Return the files inside a checkpoint that other checkpoints of its run refer to.

    Raises:
        TailorError: one of them cannot be read, or a folder cannot be listed that may hold one, so it may refer to
            anything.
    """
    files: set[Path] = set()
    # No deeper than checkpoints lie: what counts as the run may be somebody's home.
    found = checkpoints_below(location.run)
    for folder, why in found.unlisted:
        raise TailorError(f"{folder} {why}; a checkpoint in it may refer to anything.")
    for folder in found.folders:
        if not same_folder(folder, location.folder):
            base = open_base(folder)
            files |= {real(base.path(name)) for name in _names(base.metadata) if ".." in name or name.startswith("/")}
    return files


def _names(metadata: Metadata) -> set[str]:
    return {info.relative_path for info in metadata.storage_data.values()}


def _committed(checkpoint_id: str | None) -> None:
    with _lock:
        if checkpoint_id is None or not _pending:
            return
        found = _pending.pop(str(locate(checkpoint_id).folder), None)
    if found:
        _sweep(*found)


def _sweep(location: Location, old: set[str], save_id: str) -> None:
    # Between looking who has committed and removing, another save into this folder must not commit.
    with nullcontext() if is_remote(location.folder) else alone_in(location.folder):
        _remove(location, old, save_id)


def _remove(location: Location, old: set[str], save_id: str) -> None:
    try:
        metadata = read(location.folder / METADATA)
        # After a save of ours that failed, a stock save may be the next: its files may have old names.
        if save_id_of(metadata) != save_id:
            return
        in_use = referring_files(location)
    except (TailorError, OSError):  # the latter of a store
        return
    swept = {location.folder / name for name in old - _names(metadata)}
    swept = {path for path in swept if real(path) not in in_use}
    for path in swept:
        with suppress(OSError):
            path.unlink()
    prune_empty(location.folder / CARRIED)
    _restore({path.parent for path in swept if path.parent != location.folder}, location)


def _restore(folders: set[Path], location: Location) -> None:
    """Let the folders of carried files look as old as the commit: nothing was put there since."""
    for folder in folders if not is_remote(location.folder) else ():
        with suppress(OSError):
            committed = (location.folder / METADATA).stat().st_mtime_ns
            os.utime(folder, ns=(committed, committed))


dcp_events.subscribe("finish_checkpoint", "end", _committed)
