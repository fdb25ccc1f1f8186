"""Copying the blobs of a checkpoint into new files, one after the other."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StorageInfo

from tailor_dcp.base import Base
from tailor_dcp.crc import crc32
from tailor_dcp.errors import TailorError
from tailor_dcp.ranges import Advance, SourceError, copy_range, pieces, write_all

_OPEN_FILES = 64  # of the source; a composite of a large job has thousands

Stretch = tuple[str, int, int]
"""File, offset and length of a blob."""


class DamagedCheckpointError(TailorError):
    """Bytes that a checkpoint needs are gone, cut off or changed."""

    exit_code = 1


def stretch_of(info: _StorageInfo) -> Stretch:
    """Return where a blob lies."""
    return (info.relative_path, info.offset, info.length)


@dataclass
class BlobCopier:
    """Appends stretches of old files to new ones."""

    base: Base
    folder: Path
    save_id: str
    verify: bool
    largest_file: int
    advance: Advance
    files: int = 0
    checked: int = 0
    places: dict[Stretch, tuple[str, int]] = field(default_factory=dict)
    crcs: dict[str, dict[int, int]] = field(default_factory=dict)
    _sources: dict[str, int] = field(default_factory=dict)
    _target: int = -1
    _end: int = 0

    def copy(self, stretch: Stretch) -> None:
        """Append one stretch and note where it went."""
        name, offset, length = stretch
        if self._target < 0 or (self._end and self._end + length > self.largest_file):
            self._next_file()
        file = self._file(self.files - 1)
        source = self._source(name)
        known = self.base.record.crcs.get(name, {}).get(offset) if self.base.record else None
        try:
            crc = known if not self.verify else self._checked(source, stretch, known)
            if not self.verify:
                copy_range(source, self._target, offset, length, self.advance)
        except SourceError as error:
            raise DamagedCheckpointError(
                f"{self.base.path(name)} cannot be read: {error.strerror}; use another checkpoint."
            ) from error
        if crc is not None:
            self.crcs.setdefault(file, {})[self._end] = crc
        self.places[stretch] = (file, self._end)
        self._end += length

    def close(self) -> None:
        """Close all files; what was written is on the disk then."""
        if self._target >= 0:
            os.fsync(self._target)
            os.close(self._target)
            self._target = -1
        while self._sources:
            os.close(self._sources.popitem()[1])

    def _checked(self, source: int, stretch: Stretch, known: int | None) -> int:
        name, offset, length = stretch
        crc = 0
        for piece in pieces(source, offset, length):
            crc = crc32(piece, crc)
            write_all(self._target, piece)
            self.advance(len(piece))
        if known is not None and crc != known:
            keys = [index.fqn for index, info in self.base.metadata.storage_data.items() if stretch_of(info) == stretch]
            raise DamagedCheckpointError(
                f"{self.base.path(name)} has changed since it was written: the checksum of {keys[0]} "
                f"differs; merge that layer from another checkpoint."
            )
        self.checked += known is not None
        return crc

    def _next_file(self) -> None:
        if self._target >= 0:
            os.fsync(self._target)
            os.close(self._target)
        self._target = -1
        path = self.folder / self._file(self.files)
        self._target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.files, self._end = self.files + 1, 0

    def _file(self, number: int) -> str:
        return f"__0_{self.save_id[:8]}_{number}.distcp"

    def _source(self, name: str) -> int:
        if name not in self._sources:
            if len(self._sources) >= _OPEN_FILES:
                os.close(self._sources.pop(next(iter(self._sources))))
            path = self.base.path(name)
            try:
                # A pipe that somebody left there must not make it wait for ever.
                self._sources[name] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            except OSError as error:
                lost = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
                raise DamagedCheckpointError(f"{path} {lost}; use another checkpoint.") from error
        return self._sources[name]
