"""Filling files: bytes are read, converted and put in their places, a window at a time, by threads and ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tailor_dcp.crc import combine, crc32
from tailor_dcp.errors import ConversionError
from tailor_dcp.tensors import Readable, raw_bytes

from . import ranks
from .options import Progress

WINDOW = 8 << 20
"""Bytes that are in memory at a time, per thread."""
THREADS = 2
_SPLIT = 64 << 20  # bytes; a larger stretch is several pieces of work


@dataclass(frozen=True, eq=False)
class Stretch:
    """Elements of a tensor and their place in a file that is being written.

    Attributes:
        file: the file.
        offset: the byte where they go.
        tensor: the tensor.
        start: the first element, in row-major order.
        stop: the one after the last.
    """

    file: Path
    offset: int
    tensor: Readable
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """How many bytes they are."""
        return (self.stop - self.start) * self.tensor.dtype.itemsize


def whole(file: Path, offset: int, tensor: Readable) -> Stretch:
    """Return the stretch of all of a tensor's elements."""
    return Stretch(file, offset, tensor, 0, tensor.count)


def make_file(path: Path, size: int, parts: Iterable[tuple[int, bytes]] = ()) -> None:
    """Make a file of a size with some of its bytes written; the others are zeros on no disk block."""
    with path.open("xb") as stream:
        stream.truncate(size)
        for offset, data in parts:
            stream.seek(offset)
            stream.write(data)


def fill(stretches: Iterable[Stretch], progress: Progress) -> list[tuple[Stretch, int]]:
    """Write stretches to their places in files that exist; call it on all ranks with the same stretches.

    Each rank writes its share, and when it returns all of them are on the disk.

    Returns:
        On every rank, for all stretches in their order, the stretch and the CRC-32 of its bytes.

    Raises:
        DamagedSourceError: a source cannot be read.
        ConversionError: the disk is full, or the like.
    """
    stretches = list(stretches)
    work = [part for number, stretch in enumerate(stretches) for part in _split(number, stretch)]
    shares = ranks.share(work, lambda part: part[2].bytes)
    mine = shares[ranks.rank()]
    crcs = ranks.together(lambda: _run(mine, progress))
    everybody = [found for of_rank in ranks.gather(crcs) for found in of_rank]
    found: list[int] = [0] * len(stretches)
    for number, _, crc, length in sorted(everybody):
        found[number] = combine(found[number], crc, length)
    return list(zip(stretches, found, strict=True))


_Part = tuple[int, int, Stretch]
"""The number of a stretch, the number of this part of it, and the part."""


def _split(number: int, stretch: Stretch) -> Iterable[_Part]:
    width = stretch.tensor.dtype.itemsize
    step = _SPLIT // width
    for index, start in enumerate(range(stretch.start, stretch.stop, step)):
        stop = min(start + step, stretch.stop)
        offset = stretch.offset + (start - stretch.start) * width
        yield number, index, Stretch(stretch.file, offset, stretch.tensor, start, stop)


def _run(parts: Sequence[_Part], progress: Progress) -> list[tuple[int, int, int, int]]:
    with _Targets() as targets, ThreadPoolExecutor(THREADS) as pool:
        # In the order of the file, so that each disk sees one stream a thread.
        ordered = sorted(parts, key=lambda part: (str(part[2].file), part[2].offset))
        work = [pool.submit(_write, targets, part, progress) for part in ordered]
        try:
            return [done.result() for done in work]
        except BaseException:
            for waiting in work:
                waiting.cancel()
            raise


def _write(targets: _Targets, part: _Part, progress: Progress) -> tuple[int, int, int, int]:
    number, index, stretch = part
    target = targets.open(stretch.file)
    crc = 0
    for offset, data in windows(stretch):
        crc = crc32(data, crc)
        write_at(target, data, offset, stretch.file)
        progress(len(data))
    return number, index, crc, stretch.bytes


class _Scratch(threading.local):
    """Each thread's window. Fresh memory for every stretch would cost as much as reading into it."""

    def __init__(self) -> None:
        self.window = torch.empty(WINDOW, dtype=torch.uint8)


_scratch = _Scratch()


def windows(stretch: Stretch) -> Iterable[tuple[int, memoryview]]:
    """Yield a stretch's bytes a window at a time, each with its place; a window is overwritten by the next."""
    width = stretch.tensor.dtype.itemsize
    step = max(1, WINDOW // width)
    buffer = _scratch.window.view(stretch.tensor.dtype)
    for start in range(stretch.start, stretch.stop, step):
        window = buffer[: min(step, stretch.stop - start)]
        stretch.tensor.read_into(window, start)
        yield stretch.offset + (start - stretch.start) * width, raw_bytes(window)


def write_at(target: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of ``data`` at a place.

    Raises:
        ConversionError: naming the file and what went wrong.
    """
    try:
        while data:
            count = os.pwrite(target, data, offset)
            data, offset = data[count:], offset + count
    except OSError as error:
        raise ConversionError(f"{path.name} cannot be written to {path.parent}: {error.strerror}.") from error


class _Targets:
    """The files that are being filled; all are on the disk once this is left."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            return self._open[path]

    def __enter__(self) -> _Targets:
        return self

    def __exit__(self, *error: object) -> None:
        for path, target in self._open.items():
            try:
                if error[0] is None:
                    os.fsync(target)
            except OSError as failure:
                raise ConversionError(f"{path} cannot be written: {failure.strerror}.") from failure
            finally:
                os.close(target)
