"""Bringing one file after the other to where a run is copied to."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tailor_dcp.carry import make_folder
from tailor_dcp.errors import TailorError
from tailor_dcp.location import METADATA, is_within
from tailor_dcp.ranges import Advance, copy_sparsely, pieces

PARTIAL = ".copying"
"""What a file's name ends with while it is being copied."""

Inode = tuple[int, int]
"""Device and number: what all names of one file have in common."""

_UNABLE = frozenset({errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})  # no links here, or too many


class CopyRefusedError(TailorError, ValueError):
    """The copy would harm what lies at its destination, or would not be complete."""


@dataclass(frozen=True)
class Item:
    """A file or a symbolic link, as it was when the copy began."""

    path: Path
    status: os.stat_result

    @property
    def inode(self) -> Inode:
        """What all its names have in common."""
        return (self.status.st_dev, self.status.st_ino)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.status.st_size

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.status.st_mode)


@dataclass
class CopyJob:
    """What is known while one run is copied."""

    source: Path
    target: Path
    verify: bool
    advance: Advance
    copied: int = 0
    linked: int = 0
    skipped: int = 0
    _first: dict[Inode, Path] = field(default_factory=dict)

    def destination(self, item: Item) -> Path:
        """Return where an item goes."""
        return self.target / item.path.relative_to(self.source)

    def is_there(self, item: Item) -> bool:
        """Tell whether an item was copied before; files appear under their names when they are complete."""
        new = self.destination(item)
        try:
            status = new.lstat()
        except OSError:
            return False
        if item.is_link or stat.S_ISLNK(status.st_mode):
            return item.is_link and new.is_symlink() and new.readlink() == _leads_to(item, self.source)
        return status.st_size == item.size and _same_time(item.status.st_mtime_ns, status.st_mtime_ns)

    def bring(self, item: Item) -> None:
        """Make one item be at the destination."""
        new = self.destination(item)
        make_folder(new.parent)
        first = self._first.setdefault(item.inode, new)
        if first is not new and self._link(first, new):
            return
        if self.is_there(item) and (item.is_link or not self.verify or _equal(item.path, new)):
            self.skipped += 1
            self.advance(item.size)
        elif item.is_link:
            _put(lambda partial: partial.symlink_to(_leads_to(item, self.source)), new)
        else:
            _put(lambda partial: self._copy(item, partial), new)
            self.copied += item.size

    def _link(self, first: Path, new: Path) -> bool:
        """Make a second name for what was brought; False where the file system cannot."""
        if new.exists() and os.path.samestat(first.lstat(), new.lstat()):
            self.skipped += 1
            return True
        try:
            _put(lambda partial: partial.hardlink_to(first), new)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            return False
        self.linked += 1
        return True

    def _copy(self, item: Item, partial: Path) -> None:
        with item.path.open("rb") as old, partial.open("wb") as new:
            copy_sparsely(old.fileno(), new.fileno(), item.size, self.advance)
            now = os.fstat(old.fileno())
            if item.path.name == METADATA and (now.st_ino, now.st_mtime_ns) != (item.inode[1], item.status.st_mtime_ns):
                raise CopyRefusedError(f"{item.path.parent} was saved again meanwhile; copy once more.")
            with suppress(OSError):  # not every file system has permissions
                os.fchmod(new.fileno(), stat.S_IMODE(item.status.st_mode))
            # Checkpoints without a record are ordered by the time of their .metadata.
            os.utime(new.fileno(), ns=(item.status.st_atime_ns, item.status.st_mtime_ns))
            os.fsync(new.fileno())


def _same_time(old: int, new: int) -> bool:
    """Compare modification times; some file systems keep whole milliseconds, seconds, or even ones, only."""
    return old == new or (new % 10**6 == 0 and abs(old - new) < 2 * 10**9)


def _put(make: Callable[[Path], None], new: Path) -> None:
    """Make a file under a name of its own, and give it the right one when it is complete."""
    partial = new.with_name(f"{new.name}{PARTIAL}")
    partial.unlink(missing_ok=True)
    make(partial)
    partial.replace(new)


def _leads_to(item: Item, source: Path) -> Path:
    """Return what a symbolic link's copy leads to; what leads into the run by an absolute path stays in the run."""
    leads_to = item.path.readlink()
    if leads_to.is_absolute() and is_within(leads_to, source):
        here = os.path.realpath(item.path.parent)
        return Path(os.path.relpath(os.path.realpath(leads_to), here))
    return leads_to


def _equal(a: Path, b: Path) -> bool:
    with a.open("rb") as old, b.open("rb") as new:
        size = os.fstat(old.fileno()).st_size
        both = zip(pieces(old.fileno(), 0, size), pieces(new.fileno(), 0, size), strict=True)
        return all(piece == other for piece, other in both)
