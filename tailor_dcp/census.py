"""Census: what lies in a run's folder, which of it is committed, and which files that needs."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tailor_dcp.carry import CARRIED
from tailor_dcp.errors import NoCheckpointError, TailorError
from tailor_dcp.location import METADATA, locate
from tailor_dcp.metadata.record import CarryMode, Record, record_of
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.permissions import can_list, can_write
from tailor_dcp.runs import Commit

STRIPPED = f"{METADATA}.pruned"
"""What ``.metadata`` is called once its folder is no checkpoint any more but holds files that others need."""

DOOMED = ".pruned-"
"""What the name of a folder begins with while it is being removed."""

_DATA = re.compile(r"__.*\.distcp|\.metadata\.tmp")
_OWN = re.compile(r"__\d+_([0-9a-f]{8})_.*\.distcp")
_SKEW = 60.0
"""Seconds by which the clocks of machines that write to one folder may differ."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint, or one that was.

    Attributes:
        folder: its path.
        time: when it was saved, as ``runs.commits`` has it.
        told: whether its record says so.
        changed: when its ``.metadata`` was last written.
        files: the files that it needs, symbolic links and ``..`` resolved.
        carry: how its save made earlier files part of it; None if a stock planner saved it.
        save_ids: how the ids begin of all saves that it tells of, which are over therefore; as files' names have them.
    """

    folder: Path
    time: float
    told: bool
    changed: float
    files: frozenset[str]
    carry: CarryMode | None
    save_ids: frozenset[str]


@dataclass(frozen=True)
class Entry:
    """A folder of a run, with all that is in it.

    Attributes:
        folder: its path.
        step: the step that its name tells, None if it tells none.
        checkpoints: the committed checkpoints in it; more than one where each step has several series.
        stripped: what were checkpoints until they were pruned.
        files: all its files, symbolic links included, by path.
        folders: all its folders, itself first.
    """

    folder: Path
    step: int | None
    checkpoints: tuple[Checkpoint, ...]
    stripped: tuple[Checkpoint, ...]
    files: tuple[Path, ...]
    folders: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The folder's name in its run."""
        return self.folder.name

    @property
    def commit(self) -> Commit:
        """When the last of its checkpoints was saved."""
        time = max(checkpoint.time for checkpoint in self.checkpoints)
        return Commit(self.folder, self.step or 0, time, all(checkpoint.told for checkpoint in self.checkpoints))

    @property
    def doomed(self) -> bool:
        """Whether its removal has begun."""
        return self.name.startswith(DOOMED)

    @property
    def half_withdrawn(self) -> bool:
        """Whether some of its series are checkpoints and some were: its removal had only just begun."""
        committed = {checkpoint.folder for checkpoint in self.checkpoints}
        return bool(committed) and any(checkpoint.folder not in committed for checkpoint in self.stripped)

    @property
    def relinked(self) -> bool:
        """Whether files were carried into it after its commit: a save into it has begun, and written nothing yet."""
        return bool(self.younger)

    @property
    def younger(self) -> list[tuple[Path, Checkpoint]]:
        """Its folders of carried files that are younger than the checkpoint which they are of."""
        homes = {checkpoint.folder: checkpoint for checkpoint in self.checkpoints}
        carried = [folder for folder in self.folders if folder.parent.name == CARRIED]
        found = [(folder, homes[folder.parent.parent]) for folder in carried if folder.parent.parent in homes]
        return [(folder, home) for folder, home in found if _changed(folder) > home.changed]

    @cached_property
    def real(self) -> dict[str, Path]:
        """Its files by what names them after every symbolic link is resolved."""
        root = os.path.realpath(self.folder)
        return {os.path.join(root, path.relative_to(self.folder)): path for path in self.files}  # noqa: PTH118

    @property
    def read_only(self) -> str | None:
        """What keeps it from being removed; None if nothing is known to."""
        if not can_write(self.folder.parent):
            return "the run's folder is read-only"
        if not can_write(self.folder):
            return "its folder is read-only"
        locked = next((folder for folder in self.folders if not can_write(folder)), None)
        return None if locked is None else f"{locked.relative_to(self.folder).as_posix()} in it is read-only"

    def among(self, files: frozenset[str]) -> set[Path]:
        """Return those of its files that are among ``files``, which are named as ``real`` names them."""
        return {path for real, path in self.real.items() if real in files}

    @property
    def data(self) -> list[Path]:
        """Its files that only saves make."""
        return [path for path in self.files if _DATA.fullmatch(path.name) or self._carried(path)]

    def loose(self, named: frozenset[str]) -> list[Path]:
        """Return the data files that no checkpoint names: what a save is writing, or left when it failed."""
        paths = self.real
        data = set(self.data)
        return [path for real, path in paths.items() if path in data and real not in named]

    def leftovers(self, loose: Iterable[Path], finished: frozenset[str], save_ids: frozenset[str]) -> list[Path]:
        """Return those of the loose files that no save is writing, or carrying: what an earlier one has left.

        A file that was kept because others referred to it lies there still when they are gone. A save under way has
        an id that nobody tells of yet, and puts everything into the folder after the commit of what is there.

        Args:
            loose: the data files that no checkpoint names.
            finished: files that something names which is, or was, a checkpoint.
            save_ids: how the ids of saves begin that are over.
        """
        paths = {path: real for real, path in self.real.items()}
        homes = {checkpoint.folder: checkpoint.changed for checkpoint in self.checkpoints}

        def is_over(path: Path) -> bool:
            home = next((folder for folder in path.parents if folder in homes), None)
            if home is None:
                return False
            if self._carried(path):
                return _changed(path.parent) <= homes[home]
            wrote = _OWN.fullmatch(path.name)
            if paths[path] in finished or (wrote and wrote[1] in save_ids):
                return True
            return path.name != f"{METADATA}.tmp" and _changed(path) + _SKEW < homes[home]

        return [path for path in loose if is_over(path)]

    def unfinished(self, loose: Iterable[Path]) -> bool:
        """Tell whether a part of it is not committed: a sub-folder with data, or all of it."""
        if not self.files:
            return True  # a save that has only just begun
        homes = [c.folder for c in (*self.checkpoints, *self.stripped)]
        return any(not any(path.is_relative_to(home) for home in homes) for path in loose)

    def touched(self, loose: Iterable[Path]) -> float:
        """Return when it was last written to. A link's own time is that of the file that it leads to."""
        own = [path for path in loose if not self._carried(path)]
        return max((_changed(path) for path in (*self.folders, *own)), default=0.0)

    def _carried(self, path: Path) -> bool:
        return CARRIED in path.relative_to(self.folder).parts


def census(run: Path) -> list[Entry]:
    """Return the folders of a run, in the order of their names.

    Raises:
        TailorError: a ``.metadata`` in it cannot be read, so it may need anything.
        OSError: a folder in it cannot be listed.
    """
    folders = sorted(path for path in run.iterdir() if _is_folder(path) and not _is_lost_and_found(path))
    return [_entry(folder, run) for folder in folders]


def aliases(run: Path) -> dict[str, list[str]]:
    """Return the symbolic links of a run, such as ``best``, by the real path of what they lead to."""
    found: dict[str, list[str]] = {}
    for path in sorted(run.iterdir()):
        if path.is_symlink():
            found.setdefault(os.path.realpath(path), []).append(path.name)
    return found


def needed(checkpoints: Iterable[Checkpoint]) -> frozenset[str]:
    """Return the files that any of these checkpoints needs."""
    return frozenset().union(*(checkpoint.files for checkpoint in checkpoints))


def walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each folder below and at ``folder`` with its files; symbolic links are files, never followed.

    Raises:
        OSError: a folder cannot be listed, so a checkpoint in it would be overlooked that needs other files.
    """
    for place, folders, names in os.walk(folder, onerror=unless_gone):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        yield here, [here / name for name in sorted([*names, *links])]


def unless_gone(error: OSError) -> None:
    """Raise an error again that says that a file is not there, if it is: a shared file system's cache can say so."""
    if not isinstance(error, FileNotFoundError) or os.path.lexists(error.filename):
        raise error


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError as error:
        unless_gone(error)
        return False


def _is_lost_and_found(folder: Path) -> bool:
    """Tell whether a folder is what mkfs makes at the root of a disk, which the administrator alone can list."""
    return folder.name == "lost+found" and not can_list(folder)


def _entry(folder: Path, run: Path) -> Entry:
    found = list(walk(folder))
    files = [path for _, paths in found for path in paths]
    doomed = folder.name.startswith(DOOMED)  # it is no checkpoint any more, whatever is left in it
    checkpoints = () if doomed else tuple(committed(path for path in files if path.name == METADATA))
    root = Path(os.path.abspath(run))  # noqa: PTH100 - as locate does
    # A job's number looks like a step's, yet the folder holds the job's run: it must not go as if it were one step.
    own = all(locate(place).run == root for place in (folder, *(checkpoint.folder for checkpoint in checkpoints)))
    return Entry(
        folder=folder,
        step=locate(folder).step if own else None,
        checkpoints=checkpoints,
        stripped=() if doomed else tuple(_stripped(path for path in files if path.name == STRIPPED)),
        files=tuple(files),
        folders=tuple(here for here, _ in found),
    )


def _checkpoint(path: Path) -> Checkpoint:
    metadata = read(path)
    record = record_of(metadata, str(path))
    changed = _changed(path)
    names = {info.relative_path for info in metadata.storage_data.values()}
    files = frozenset(os.path.realpath(path.parent / name) for name in names)
    # A file that is a symbolic link is needed itself, and so is what it leads to.
    here = os.path.realpath(path.parent)
    links = frozenset(os.path.normpath(os.path.join(here, name)) for name in names)  # noqa: PTH118
    return Checkpoint(
        folder=path.parent,
        time=record.time if record else changed,
        told=record is not None,
        changed=changed,
        files=files | links,
        carry=record.carry if record else None,
        save_ids=frozenset(save_id[:8] for save_id in _told(record)),
    )


def _told(record: Record | None) -> Iterator[str]:
    """Yield the ids of the saves that a checkpoint tells of."""
    if record is not None:
        yield record.save_id
        yield from (unit.origin.save_id for unit in record.units.values())
        if record.parent is not None:
            yield record.parent.save_id


def committed(paths: Iterable[Path]) -> Iterator[Checkpoint]:
    """Yield the checkpoints of ``.metadata`` files.

    Raises:
        TailorError: one cannot be read, so it may need anything.
    """
    for path in paths:
        try:
            found = _checkpoint(path)
        except NoCheckpointError:  # stock writers remove the old one before they rename the new one
            if not os.path.lexists(path):
                continue
            found = _checkpoint(path)  # what was taken for gone may need any file
        yield found


def _stripped(paths: Iterable[Path]) -> Iterator[Checkpoint]:
    for path in paths:
        with suppress(TailorError):  # nothing needs it but the next prune, which then finds less
            yield _checkpoint(path)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # removed since it was listed
        return 0.0
