"""Copying the blobs of a checkpoint into new files, one after the other."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from tailor_dcp.base import Base
from tailor_dcp.crc import combine, crc32
from tailor_dcp.errors import TailorError
from tailor_dcp.file_marks import mark_of
from tailor_dcp.frames import frame
from tailor_dcp.metadata.compose import chunk_shape
from tailor_dcp.ranges import Advance, SourceError, copy_range, pieces, write_all
from tailor_dcp.raw_stretch import is_raw

_OPEN_FILES = 64  # of the source; a composite of a large job has thousands


class Stretch(NamedTuple):
    """A blob's place, or a raw stretch's, of which a blob is made.

    Attributes:
        file: the file's name.
        offset: the first byte.
        length: how many bytes.
        shape: of the chunk that a raw stretch is; None for a blob.
        dtype: its dtype.
    """

    file: str
    offset: int
    length: int
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


class DamagedCheckpointError(TailorError):
    """Bytes that a checkpoint needs are gone, cut off or changed."""

    exit_code = 1


def stretch_of(index: MetadataIndex, info: _StorageInfo, metadata: Metadata) -> Stretch:
    """Return where a chunk lies."""
    place = Stretch(info.relative_path, info.offset, info.length)
    entry = metadata.state_dict_metadata.get(index.fqn)
    if not is_raw(info) or not isinstance(entry, TensorStorageMetadata):
        return place
    return place._replace(shape=tuple(chunk_shape(index, entry)), dtype=entry.properties.dtype)


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
    bytes: int = 0
    places: dict[Stretch, _StorageInfo] = field(default_factory=dict)
    crcs: dict[str, dict[int, int]] = field(default_factory=dict)
    _sources: dict[str, int] = field(default_factory=dict)
    _target: int = -1
    _end: int = 0

    def copy(self, stretch: Stretch) -> None:
        """Append one stretch, as a blob, and note where it went."""
        source = self._source(stretch.file)
        length = self._length(source, stretch)
        if self._target < 0 or (self._end and self._end + length > self.largest_file):
            self._next_file()
        file = self._file(self.files - 1)
        try:
            crc = self._copied(source, stretch) if stretch.shape is None else self._framed(source, stretch)
        except SourceError as error:
            raise DamagedCheckpointError(
                f"{self.base.path(stretch.file)} cannot be read: {error.strerror}; use another checkpoint."
            ) from error
        if crc is not None:
            self.crcs.setdefault(file, {})[self._end] = crc
        self.places[stretch] = _StorageInfo(file, self._end, length)
        self._end += length
        self.bytes += length

    def close(self) -> None:
        """Close all files; what was written is on the disk then."""
        if self._target >= 0:
            os.fsync(self._target)
            os.close(self._target)
            self._target = -1
        while self._sources:
            os.close(self._sources.popitem()[1])

    def _length(self, source: int, stretch: Stretch) -> int:
        """Return the bytes of the blob."""
        if stretch.shape is None or stretch.dtype is None:
            return stretch.length
        size, end = os.fstat(source).st_size, stretch.offset + stretch.length
        if size < end:  # whoever says so may name any size
            raise DamagedCheckpointError(
                f"{self.base.path(stretch.file)} has {size} bytes where {end} are needed; use another checkpoint."
            )
        before, after = frame(stretch.shape, stretch.dtype, 0)
        return len(before) + stretch.length + len(after)

    def _copied(self, source: int, stretch: Stretch) -> int | None:
        name, offset, length, *_ = stretch
        known = self.base.record.crcs.get(name, {}).get(offset) if self.base.record else None
        if not self.verify:
            copy_range(source, self._target, offset, length, self.advance)
            return known
        crc = 0
        for piece in pieces(source, offset, length):
            crc = crc32(piece, crc)
            write_all(self._target, piece)
            self.advance(len(piece))
        if known is not None and crc != known:
            of = (i.fqn for i, info in self.base.metadata.storage_data.items() if _same(info, stretch))
            raise DamagedCheckpointError(
                f"{self.base.path(name)} has changed since it was written: the checksum of {next(of)} "
                f"differs; merge that layer from another checkpoint."
            )
        self.checked += known is not None
        return crc

    def _framed(self, source: int, stretch: Stretch) -> int:
        """Put around bytes what ``torch.save`` puts around them, which has their checksum at its end."""
        assert stretch.shape is not None and stretch.dtype is not None
        before, _ = frame(stretch.shape, stretch.dtype, 0)
        write_all(self._target, before)
        crc = 0
        for piece in pieces(source, stretch.offset, stretch.length):
            crc = crc32(piece, crc)
            write_all(self._target, piece)
            self.advance(len(piece))
        _, after = frame(stretch.shape, stretch.dtype, crc)
        write_all(self._target, after)
        return combine(combine(crc32(before), crc, stretch.length), crc32(after), len(after))

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
            self._check_mark(name, path)
        return self._sources[name]

    def _check_mark(self, name: str, path: Path) -> None:
        mark = self.base.record.marks.get(name) if self.base.record else None
        if mark is not None and mark_of(path) != mark:
            raise DamagedCheckpointError(
                f"{path} has changed since {self.base.location.folder} was linked to it; restore the file, or convert "
                f"its checkpoint anew."
            )


def _same(info: _StorageInfo, stretch: Stretch) -> bool:
    return (info.relative_path, info.offset, info.length) == stretch[:3]
