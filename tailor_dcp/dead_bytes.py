"""Dead bytes: what data files of a run hold that none of its checkpoints needs."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from tailor_dcp.census import Checkpoint
from tailor_dcp.compact_plan import Stretch
from tailor_dcp.location import METADATA
from tailor_dcp.metadata.digest import digest
from tailor_dcp.metadata.record import ATTRIBUTE, DIGEST, record_of
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.permissions import can_restore
from tailor_dcp.raw_stretch import is_raw
from tailor_dcp.repointing import in_run

DATA_FILE = re.compile(r"(__\d+_.*?)(?:-[0-9a-f]{8})?\.distcp")
"""What a save calls its data files; of what a compaction has called one, the first part."""

Inode = tuple[int, int]


@dataclass(frozen=True)
class Rewrite:
    """What becomes of one data file that is mostly dead.

    Attributes:
        file: its path in the run; other names of it are not told.
        before: its bytes.
        after: those that kept checkpoints need.
        checkpoints: how many of them do.
        why_not: why nothing is freed; None if something is.
    """

    file: str
    before: int
    after: int
    checkpoints: int
    why_not: str | None = None

    @property
    def freed(self) -> int:
        """Bytes that the rewriting gives back."""
        return 0 if self.why_not else self.before - self.after

    def waiting(self) -> Rewrite:
        """Return what is told where the old file could not be removed."""
        why = "it is rewritten, but a save has begun meanwhile: the next prune removes the old file"
        return replace(self, why_not=self.why_not or why)


@dataclass
class DataFile:
    """A file, whatever names it has, and what checkpoints need of it.

    Attributes:
        status: of its inode.
        names: its paths relative to the run, folders resolved.
        live: the stretches that are needed.
        users: the folders of the checkpoints that need it.
        odd: why it is none that can be rewritten.
    """

    status: os.stat_result
    names: set[str] = field(default_factory=set)
    live: set[Stretch] = field(default_factory=set)
    users: set[Path] = field(default_factory=set)
    odd: str | None = None

    @property
    def needed(self) -> int:
        """Its live bytes."""
        return sum(length for _, length in self.live)

    def why_not(self, links_gone: int) -> str | None:
        """Return why it cannot be rewritten, None if it can.

        Args:
            links_gone: how many of its names go anyway.
        """
        if self.odd:
            return self.odd
        if self.status.st_nlink - links_gone > len(self.names):
            return "it has another name, in a save under way or outside of the run, so nothing would be freed"
        ordered = sorted(self.live)
        if any(start + length > then for (start, length), (then, _) in pairwise(ordered)):
            return "two entries are placed in the same bytes; it is damaged"
        if ordered[0][0] < 0 or ordered[-1][0] + ordered[-1][1] > self.status.st_size:
            return "it is shorter than what is needed of it; it is damaged"
        return None


def survey(run: Path, users: Iterable[Checkpoint]) -> dict[Inode, DataFile]:
    """Return what checkpoints need of each data file.

    Raises:
        UnreadableMetadataError: a ``.metadata`` cannot be read.
    """
    files: dict[Inode, DataFile] = {}
    for user in users:
        metadata = read(user.folder / METADATA)
        record = record_of(metadata, str(user.folder / METADATA))
        marks = record.marks if record else {}
        changed, locked = _is_changed(metadata), not can_restore(user.folder)
        found: dict[str, DataFile | None] = {}
        for info in metadata.storage_data.values():
            name = info.relative_path
            if name not in found:
                found[name] = _find(run, user.folder, name, files)
            file = found[name]
            if file is None:
                continue
            file.users.add(user.folder)
            file.live.add((info.offset, info.length))
            if is_raw(info) or name in marks:
                file.odd = "another program wrote it"
            if locked:
                file.odd = _locked(user.folder)
            if changed:  # written anew it would be signed anew
                file.odd = f"{user.folder / METADATA} has changed since it was written: run `tailor verify`"
    return files


def _is_changed(metadata: Metadata) -> bool:
    told = getattr(metadata, ATTRIBUTE, {}).get(DIGEST)
    return told is not None and digest(metadata) != told


def _find(run: Path, folder: Path, name: str, files: dict[Inode, DataFile]) -> DataFile | None:
    path = folder / name
    try:
        status = path.lstat()
    except OSError:
        if os.path.lexists(path):  # what it is needed for would be overlooked
            raise
        return None  # nothing can be freed of what is not there
    file = files.setdefault((status.st_dev, status.st_ino), DataFile(status))
    inside = in_run(path, run)
    if inside is not None:
        file.names.add(inside)
    if not stat.S_ISREG(status.st_mode):
        file.odd = "it is a symbolic link"
    elif inside is None or Path(name).is_absolute():
        file.odd = "it lies outside of the run"
    elif not DATA_FILE.fullmatch(path.name):
        file.odd = "its name is none that a save gives"
    elif not can_restore(path.parent):
        file.odd = _locked(path.parent)
    return file


def _locked(folder: Path) -> str:
    return f"{folder} is read-only, or another user's, who alone can have its files rewritten"


def rewrites(
    files: Mapping[Inode, DataFile],
    threshold: float,
    links_gone: Mapping[Inode, int],
    may_be_referred_to: Collection[Path],
) -> list[tuple[DataFile, Rewrite]]:
    """Return the files of whose bytes more than a share is dead, and what becomes of each.

    Args:
        files: what is needed of each.
        threshold: that share, between 0 and 1.
        links_gone: how many names of each file go anyway.
        may_be_referred_to: the checkpoints whose files a save under way may refer to by their names.
    """
    found = []
    for inode, file in files.items():
        size = file.status.st_size
        if file.live and size - file.needed > threshold * size:
            why_not = file.why_not(links_gone.get(inode, 0))
            if why_not is None and not file.users.isdisjoint(may_be_referred_to):
                why_not = "a save under way may refer to it: --idle says that none is"
            name = min(file.names, key=lambda name: ("/carried/" in name, name), default="?")
            found.append((file, Rewrite(name, size, file.needed, len(file.users), why_not)))
    return sorted(found, key=lambda pair: pair[1].file)
