"""Leftovers: what calls that were killed have left beside the checkpoints of a run."""

from __future__ import annotations

import re
import shutil
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tailor_dcp.census import walk
from tailor_dcp.errors import TailorError
from tailor_dcp.locks import Lock, is_held

COMPACTION = ".compact"
"""The folder in a run that a compaction works in."""

_STAGING = re.compile(r"\.(?P<result>.+)\.(?P<verb>materialize|merge|convert)")
_REPORT = re.compile(r"\.[0-9a-f]{16}\.tmp")
_WORDS = {"materialize": "`tailor materialize`", "merge": "`tailor merge`", "convert": "`tailor-convert`"}
QUIET = 3600.0
"""Seconds in which whatever has no lock is still being written."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder that grows under a name of its own until it is complete.

    Attributes:
        path: where it is.
        what: who made it, and of what.
        bytes: what its files take.
        written: when it was last written to, seconds since the epoch.
        busy: whether a process still works on it.
    """

    path: Path
    what: str
    bytes: int
    written: float
    busy: bool

    def files(self) -> list[Path]:
        """Return its files, or itself."""
        return [path for path in _all(self.path) if path.is_symlink() or not path.is_dir()]

    def remove(self) -> None:
        """Remove it, and then what locks it.

        Raises:
            TailorError: a call has begun anew meanwhile and works on it.
        """
        lock = Lock(_lock_of(self.path), TailorError(f"{self.path} is being worked on again; prune once more."))
        lock.take()
        try:
            if self.path.is_dir() and not self.path.is_symlink():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)
        finally:
            lock.release()


def find(run: Path) -> list[Leftover]:
    """Return the leftovers in a run's folder, by name."""
    found = []
    for path in sorted(run.iterdir()):
        what = _named(path.name)
        if what is not None:
            size, written = taken(path)
            busy = is_held(_lock_of(path)) if _lock_of(path).exists() else time.time() - written < QUIET
            found.append(Leftover(path, what, size, written, busy))
    return found


def taken(path: Path) -> tuple[int, float]:
    """Return the bytes of all files in a folder, each counted once, and when anything in it was last written."""
    sizes: dict[tuple[int, int], int] = {}
    written = 0.0
    for item in _all(path):
        with suppress(OSError):  # removed since it was listed
            status = item.lstat()
            written = max(written, status.st_mtime)
            if not stat.S_ISDIR(status.st_mode):
                sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values()), written


def _all(path: Path) -> Iterable[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        for folder, files in walk(path):
            yield folder
            yield from files


def _named(name: str) -> str | None:
    if name == COMPACTION:
        return "a compaction"
    if _REPORT.fullmatch(name):
        return "`tailor report`"
    staging = _STAGING.fullmatch(name)
    return f"{_WORDS[staging['verb']]} of {staging['result']}" if staging else None


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
