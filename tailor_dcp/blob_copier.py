"""Copying the blobs of checkpoints into new files, and checking them on the way."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tailor_dcp.blob_sums import BlobSums, Sum
from tailor_dcp.crc import combine, crc32
from tailor_dcp.errors import TailorError
from tailor_dcp.file_marks import Mark, mark_of
from tailor_dcp.frames import frame
from tailor_dcp.input_files import InputFile, open_input
from tailor_dcp.layout import Blob, NewFile
from tailor_dcp.new_folder import NewFolder, Sink
from tailor_dcp.ranges import Advance, SourceError, in_kernel

_PIECE = 16 << 20
"""Bytes that are copied in one go."""
_LOOKED_AT = 1 << 20
"""Bytes that are copied before they are looked at: few enough to be in the processor's cache still."""


class DamagedCheckpointError(TailorError):
    """Bytes that a checkpoint needs are gone, cut off or changed."""

    exit_code = 1


class Source(NamedTuple):
    """A file that is copied from.

    Attributes:
        path: where it is.
        mark: what it was when a checkpoint was linked to it; None if it is no other program's.
        needed_by: the checkpoint that was.
    """

    path: Path
    mark: Mark | None
    needed_by: Path


@dataclass
class Tally:
    """What came of copying.

    Attributes:
        crcs: the checksum of each blob by new file and place, as far as they are known.
        checked: how many had one before, which agreed.
    """

    crcs: dict[str, dict[int, int]] = field(default_factory=dict)
    checked: int = 0

    def add(self, other: Tally) -> None:
        """Take in another's."""
        for name, crcs in other.crcs.items():
            self.crcs.setdefault(name, {}).update(crcs)
        self.checked += other.checked


@dataclass(frozen=True)
class BlobCopier:
    """Writes new files.

    Attributes:
        sources: the files that are copied from, by name.
        folder: where the new ones go.
        verify: compute the checksum of every blob, and compare it where it has one.
        advance: is told of bytes that were copied, from any thread.
    """

    sources: Mapping[str, Source]
    folder: NewFolder
    verify: bool
    advance: Advance

    def copy(self, files: Sequence[NewFile], threads: int) -> Tally:
        """Write all of these, several at a time.

        Raises:
            DamagedCheckpointError: a file is missing, too short or changed, or a checksum differs.
            OSError: one cannot be written.
        """
        for name in dict.fromkeys(blob.stretch.file for new in files for blob in new.blobs):
            self._check_mark(self.sources[name])
        tally = Tally()
        if threads == 1 or len(files) < 2:
            for new in files:
                tally.add(self._write(new))
            return tally
        with ThreadPoolExecutor(threads) as pool:
            # The largest first, so that all end together.
            work = [pool.submit(self._write, new) for new in sorted(files, key=lambda new: new.size, reverse=True)]
            try:
                for done in work:
                    tally.add(done.result())
            except BaseException:
                for waiting in work:
                    waiting.cancel()
                raise
        return tally

    def _write(self, new: NewFile) -> Tally:
        file = _OneFile(self, new)
        file.write()
        return Tally({new.name: file.crcs} if file.crcs else {}, file.checked)

    @staticmethod
    def _check_mark(source: Source) -> None:
        if source.mark is not None and mark_of(source.path) != source.mark:
            raise DamagedCheckpointError(
                f"{source.path} has changed since {source.needed_by} was linked to it; restore the file, or convert "
                f"its checkpoint anew."
            )


class _OneFile:
    """The work on one new file."""

    def __init__(self, copier: BlobCopier, new: NewFile) -> None:
        self._copier, self._new = copier, new
        self._places = iter(new.places)
        self._stays_in_kernel = True
        self.crcs: dict[int, int] = {}
        self.checked = 0

    def write(self) -> None:
        new, copier = self._new, self._copier
        if new.whole and copier.folder.share(copier.sources[new.blobs[0].stretch.file].path, new.name):
            self._look(new.blobs)
            return
        with copier.folder.create(new.name) as sink, ExitStack() as stack:
            name, source = "", None
            for run in _runs(new.blobs):
                if source is None or run[0].stretch.file != name:
                    stack.close()
                    name = run[0].stretch.file
                    source = stack.enter_context(self._opened(name))
                self._copy(run, source, sink)

    def _look(self, blobs: Sequence[Blob]) -> None:
        """Do with a file that was copied by others what is done with one that is copied here."""
        name, length = blobs[0].stretch.file, self._new.size
        sums = self._sums(blobs)
        if sums is not None:
            with self._opened(name) as source:
                for data in source.windows(0, length):
                    sums(data)
                    self._copier.advance(len(data))
        else:
            self._copier.advance(length)

    def _copy(self, run: Sequence[Blob], source: InputFile, sink: Sink) -> None:
        start, length = run[0].stretch.offset, run[-1].stretch.end - run[0].stretch.offset
        if run[0].stretch.shape is None:
            self._move(source, sink, start, length, self._sums(run))
        else:
            self._frame(run[0], source, sink)

    def _frame(self, blob: Blob, source: InputFile, sink: Sink) -> None:
        """Put around bytes what ``torch.save`` puts around them, which has their checksum at its end."""
        _, start, length, shape, dtype = blob.stretch
        assert shape is not None and dtype is not None
        before, _ = frame(shape, dtype, 0)
        sink.write(before)
        crc = 0

        def look(data: memoryview) -> None:
            nonlocal crc
            crc = crc32(data, crc)

        self._move(source, sink, start, length, look)
        _, after = frame(shape, dtype, crc)
        sink.write(after)
        whole = combine(combine(crc32(before), crc, length), crc32(after), len(after))
        self.crcs[next(self._places)] = whole

    def _move(
        self, source: InputFile, sink: Sink, start: int, length: int, look: Callable[[memoryview], None] | None
    ) -> None:
        """Append a stretch, and show it all to ``look``."""
        piece = _LOOKED_AT if look and self._by_kernel(source, sink) else _PIECE
        for at in range(start, start + length, piece):
            size, done = min(piece, start + length - at), 0
            if self._by_kernel(source, sink):
                assert source.descriptor is not None
                assert sink.descriptor is not None
                done = in_kernel(source.descriptor, sink.descriptor, at, size, self._copier.advance)
                self._stays_in_kernel = done == size
            for data in source.windows(at, done) if look else ():
                look(data)  # type: ignore[misc]
            for data in source.windows(at + done, size - done):
                if look:
                    look(data)
                sink.write(data)
                self._copier.advance(len(data))
            sink.flow()

    def _by_kernel(self, source: InputFile, sink: Sink) -> bool:
        return self._stays_in_kernel and source.descriptor is not None and sink.descriptor is not None

    def _sums(self, blobs: Sequence[Blob]) -> Callable[[memoryview], None] | None:
        """Return what takes in the bytes of blobs that lie together, notes their checksums and compares them."""
        if not self._copier.verify:
            for blob in blobs:
                self._note(blob.crc)
            return None
        sums = BlobSums((blob.stretch.length, blob.crc) for blob in blobs)
        coming = iter(blobs)

        def look(data: memoryview) -> None:
            for found in sums.feed(data):
                self._compare(next(coming), found)

        return look

    def _compare(self, blob: Blob, found: Sum) -> None:
        if found.good is False:
            raise DamagedCheckpointError(
                f"{self._path(blob.stretch.file)} has changed since it was written: the checksum of {blob.key} "
                f"differs; merge that layer from another checkpoint."
            )
        self.checked += found.good is not None
        self._note(found.crc)

    def _note(self, crc: int | None) -> None:
        place = next(self._places)
        if crc is not None:
            self.crcs[place] = crc

    def _path(self, name: str) -> Path:
        return self._copier.sources[name].path

    @contextmanager
    def _opened(self, name: str) -> Iterator[InputFile]:
        path = self._path(name)
        try:
            opening = open_input(path)
        except OSError as error:
            raise unreadable(path, error) from error
        with opening as source:
            try:
                yield source
            except SourceError as error:
                raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DamagedCheckpointError:
    """Return what to raise where a file cannot be read."""
    lost = "is missing" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
    return DamagedCheckpointError(f"{path} {lost}; use another checkpoint.")


def _runs(blobs: Sequence[Blob]) -> Iterator[list[Blob]]:
    """Yield blobs that lie together in one file together; raw stretches, which get frames, one by one."""
    run: list[Blob] = []
    for blob in blobs:
        here, before = blob.stretch, run[-1].stretch if run else None
        joined = before and here.shape is None is before.shape and (here.file, here.offset) == (before.file, before.end)
        if run and not joined:
            yield run
            run = []
        run.append(blob)
    if run:
        yield run
