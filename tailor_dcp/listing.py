"""Listing: the checkpoints in a run's folders, and what of these could not be looked into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tailor_dcp.carry import CARRIED
from tailor_dcp.census import DOOMED, unless_gone
from tailor_dcp.location import DEEPEST_SERIES, METADATA, is_step, locate, real
from tailor_dcp.store_path import reason
from tailor_dcp.stores import is_remote

_NEVER = frozenset({CARRIED, "lost+found"})
"""Folders that are no checkpoints: one has thousands of files, the other only the administrator may look into."""


class Unlisted(NamedTuple):
    """A folder that may hold checkpoints, and could not be looked into.

    Attributes:
        folder: its path.
        why: half a sentence.
    """

    folder: Path
    why: str


class Listing(NamedTuple):
    """What lies below a run.

    Attributes:
        folders: of committed checkpoints, in the order of their names.
        unlisted: what could not be looked into.
    """

    folders: list[Path]
    unlisted: list[Unlisted]


def checkpoints_below(run: Path) -> Listing:
    """Return the committed checkpoints in a run's folders, or in those of several runs.

    A link that leads into the run is another name of what is there, as ``latest``; one that leads out of it, as to
    another disk, is followed, but not where it lies in a step's folder: what is in there anybody may have made.

    Raises:
        OSError: a store cannot be asked.
    """
    if is_remote(run):
        return Listing(sorted(_without_doomed(run, _globbed(run))), [])
    walk = _Walk(run)
    walk.into(run, 0)
    walk.follow()
    return Listing(sorted(_without_doomed(run, walk.folders)), sorted(walk.unlisted))


def _without_doomed(run: Path, folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        if not any(name.startswith(DOOMED) for name in folder.relative_to(run).parts):
            yield folder


def _globbed(run: Path) -> list[Path]:
    depths = ("/".join("*" * depth) for depth in range(1, DEEPEST_SERIES + 2))
    return [path.parent for depth in depths for path in run.glob(f"{depth}/{METADATA}")] if run.is_dir() else []


class _Walk:
    """Looks through a run's folders, and through those that its links lead to.

    Args:
        run: where it begins.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._links: list[tuple[Path, int]] = []
        self.folders: list[Path] = []
        self.unlisted: list[Unlisted] = []

    def into(self, folder: Path, depth: int) -> None:
        """Look through a folder.

        Args:
            folder: its path.
            depth: how many folders below the run it is.
        """
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            inner = [one.name for one in found if one.is_dir(follow_symlinks=False) and one.name not in _NEVER]
        except OSError as error:
            self._failed(folder, error)
            return
        if depth and any(one.name == METADATA for one in found):  # whoever put a folder there has damaged it
            self.folders.append(folder)
        if not any(map(is_step, folder.relative_to(self._run).parts)):
            self._links += [(folder / one.name, depth + 1) for one in found if one.is_symlink()]
        if depth <= DEEPEST_SERIES:
            for name in inner:
                self.into(folder / name, depth + 1)

    def follow(self) -> None:
        """Look through what links lead to, each once: by that of its names which is its own, if there is one."""
        known = [real(self._run)]
        while self._links:
            links = sorted(self._links, key=lambda link: (link[0].name != real(link[0]).name, link))
            self._links = []
            for link, depth in links:
                target = real(link)
                if not any(target.is_relative_to(one) or one.is_relative_to(target) for one in known):
                    known.append(target)
                    self._follow(link, target, depth)

    def _follow(self, link: Path, target: Path, depth: int) -> None:
        try:
            is_folder = target.is_dir()
        except OSError as error:
            self._failed(link, error)
            return
        here = locate(link)
        if is_folder:
            self.into(link, depth)
        elif here.step is not None and not here.series and not os.path.lexists(target):
            # A disk is not there. Other links to nothing, as a ``best`` of old, have no meaning.
            self.unlisted.append(Unlisted(link, f"leads to {target}, where nothing is"))

    def _failed(self, folder: Path, error: OSError) -> None:
        try:
            unless_gone(error)
        except OSError:
            self.unlisted.append(Unlisted(folder, f"could not be looked into: {reason(error)}"))
