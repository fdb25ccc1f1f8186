"""Removing checkpoints so that at no moment a part of one looks like a whole one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tailor_dcp.carry import CARRIED, prune_empty, sync_folder
from tailor_dcp.census import DOOMED, STRIPPED, Entry, walk
from tailor_dcp.errors import TailorError
from tailor_dcp.location import METADATA
from tailor_dcp.locks import alone_in
from tailor_dcp.repointing import unchanged


def condemned(entry: Entry, spared: set[Path]) -> list[Path]:
    """Return the files of an entry that go: all of them, or only data where some of it stays."""
    return [path for path in entry.data if path not in spared] if spared else list(entry.files)


def overwritten(entry: Entry, spared: set[Path]) -> list[Path]:
    """Return the lists of an earlier prune that ``withdraw`` writes over, where ``condemned`` does not count them."""
    lists = (checkpoint.folder / STRIPPED for checkpoint in entry.checkpoints)
    return [path for path in lists if path in entry.files] if spared else []


def withdraw(entry: Entry) -> None:
    """Make a folder no checkpoint any more and touch nothing else.

    It is done to all that go before the first byte does: of two that go, one may refer to the other.

    Raises:
        TailorError: a save into it has been committed since it was looked at.
    """
    for checkpoint in entry.checkpoints:
        folder = checkpoint.folder
        with alone_in(folder):
            if (folder / METADATA).lstat().st_mtime != checkpoint.changed:
                raise TailorError(f"{folder} was saved again meanwhile; no byte is removed, prune once more.")
            (folder / METADATA).replace(folder / STRIPPED)
            sync_folder(folder)


def remove(entry: Entry) -> None:
    """Remove a folder. It loses its name first, so that a save into it begins anew and the next prune finds it."""
    doomed = entry.folder
    if not entry.doomed:
        doomed = entry.folder.with_name(f"{DOOMED}{entry.name}")
        if doomed.is_symlink():  # no removal of ours
            doomed.unlink()
        elif doomed.exists():  # an earlier removal of a folder of this name was cut off
            _empty(doomed)
        entry.folder.rename(doomed)
        sync_folder(doomed.parent)
    _empty(doomed)


def _empty(folder: Path) -> None:
    """Remove a folder with all that is in it."""
    found = list(walk(folder))
    for path in (path for _, paths in found for path in paths):
        path.unlink(missing_ok=True)
    for here, _ in reversed(found):  # what is deeper comes later in the walk
        here.rmdir()


def strip(entry: Entry, spared: set[Path]) -> None:
    """Remove the data that nobody needs. The list of what was there stays, for the next prune to go by."""
    for path in condemned(entry, spared):
        path.unlink(missing_ok=True)
    for folder in reversed(entry.folders):
        if not any(folder.iterdir()):
            folder.rmdir()


def free(paths: Iterable[Path]) -> None:
    """Remove files out of folders that stay, and sub-folders left empty."""
    for path in paths:
        with unchanged(path.parent):
            path.unlink(missing_ok=True)
    for folder in {path.parent for path in paths if path.parent.parent.name == CARRIED}:
        prune_empty(folder.parent)
