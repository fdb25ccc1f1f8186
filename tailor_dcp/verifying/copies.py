"""Copies: files of one name and one save in several checkpoints, which should be one file, or at least the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tailor_dcp.amounts import counted, size
from tailor_dcp.base import Base
from tailor_dcp.carry import CARRIED
from tailor_dcp.verifying.checkpoint_check import FileId, Place
from tailor_dcp.verifying.outcomes import Outcomes, Stretch


class _Written(NamedTuple):
    """What names a file wherever it is linked to: the save that wrote it, and how that called it."""

    save_id: str
    name: str


class Odd(NamedTuple):
    """Part of a file that is not what other copies of the file have there.

    Attributes:
        folder: the checkpoint.
        name: the file, as the checkpoint calls it.
        stretches: the blobs that differ.
        decided: whether most checkpoints have other bytes there; if not, nothing tells which of them are right.
    """

    folder: Path
    name: str
    stretches: frozenset[Stretch]
    decided: bool


class Copies:
    """Remembers which checkpoint has which file under which name."""

    def __init__(self) -> None:
        self._homes: dict[_Written, dict[FileId, dict[Path, str]]] = {}
        self._sizes: dict[FileId, int] = {}
        self._linked: set[_Written] = set()

    def note(self, base: Base, places: Mapping[str, Place]) -> None:
        """Take in the files of a checkpoint."""
        for name, place in places.items():
            parts = PurePosixPath(name).parts
            carried = len(parts) == 3 and parts[0] == CARRIED
            save_id = parts[1] if carried else base.save_id if len(parts) == 1 else ""
            if not save_id:
                continue
            written = _Written(save_id, parts[-1])
            self._homes.setdefault(written, {}).setdefault(place.id, {})[base.location.folder] = name
            self._sizes[place.id] = place.size
            if carried and base.record is not None and base.record.carry == "link":
                self._linked.add(written)

    def odd(self, outcomes: Outcomes) -> Iterator[Odd]:
        """Yield what differs among copies though its own checksums agree: a file was put in the place of another.

        What most checkpoints have is right; where there is no such majority, none is taken for right or for wrong.

        Args:
            outcomes: what came of each file's blobs.
        """
        for copies in self._homes.values():
            if len(copies) < 2:
                continue
            marks: dict[Stretch, dict[int, set[FileId]]] = {}
            for file in copies:
                for stretch, mark in outcomes.marks(file):
                    marks.setdefault(stretch, {}).setdefault(mark, set()).add(file)
            odd: dict[tuple[FileId, bool], set[Stretch]] = {}
            for stretch, groups in marks.items():
                files, decided = _minority(list(groups.values()), copies)
                for file in files:
                    odd.setdefault((file, decided), set()).add(stretch)
            for (file, decided), stretches in odd.items():
                yield from (Odd(folder, name, frozenset(stretches), decided) for folder, name in copies[file].items())

    def lost_links(self) -> Iterator[str]:
        """Yield a sentence if files are there several times that were one."""
        lost = [homes for written, homes in self._homes.items() if written in self._linked and len(homes) > 1]
        if lost:
            more = sum(sum(sorted(self._sizes[file] for file in homes)[1:]) for homes in lost)
            yield (
                f"{counted(len(lost), 'file')} that checkpoints share by links {'is' if len(lost) == 1 else 'are'} "
                f"there in several copies, {size(more)} more than needed: links were lost, as by rsync without -H. "
                f"`tailor copy` keeps them."
            )


def _minority(groups: list[set[FileId]], copies: Mapping[FileId, Collection[Path]]) -> tuple[set[FileId], bool]:
    """Return the files that are not in the group which most checkpoints have, or all where no group is that."""
    if len(groups) == 1:
        return set(), True
    votes = [sum(len(copies[file]) for file in group) for group in groups]
    right = [group for group, count in zip(groups, votes, strict=True) if count == max(votes)]
    decided = len(right) == 1
    return set().union(*(group for group in groups if not decided or group is not right[0])), decided
