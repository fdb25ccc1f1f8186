"""Reading: what one rank's load reads, from the checks before the first byte to the last copy."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

from tailor_dcp.archives import Archived, archived_in, touched
from tailor_dcp.byte_runs import Box, Runs, runs_of
from tailor_dcp.contents import Contents
from tailor_dcp.crc import crc32
from tailor_dcp.errors import DamagedSourceError, LoadError
from tailor_dcp.fetching import Fetch, fetch
from tailor_dcp.open_checkpoint import Checkpoint
from tailor_dcp.open_files import read_file
from tailor_dcp.raw_blobs import HEAD, Plain, plain
from tailor_dcp.raw_stretch import Described, bytes_of, is_raw
from tailor_dcp.staging import Staging, batches

_SMALL = 2048
"""Bytes; shorter runs than these are read together with what lies between them."""
_STAGED = 64 << 20
"""Bytes that are on their way to a tensor that they cannot be read straight into."""
_WINDOW = 8 << 20

_T = TypeVar("_T")
_R = TypeVar("_R")


class Read(NamedTuple):
    """A tensor, or a part of one, that is read into a tensor of this rank.

    Attributes:
        item: what DCP's plan says.
        info: the blob.
        target: what is filled.
        shape: the shape of the chunk that the blob holds; None where only the blob tells.
        dtype: its dtype; None likewise.
    """

    item: ReadItem
    info: _StorageInfo
    target: torch.Tensor
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None

    @property
    def key(self) -> str:
        """The key in the checkpoint; what comes from another step has that step before it."""
        return str(self.item.storage_index.fqn).rpartition("\0")[2]


class _Piece(NamedTuple):
    """A part of a tensor that is read beside it: the box, and the larger one that is read at once to get it."""

    one: Read
    found: Plain
    wide: Box
    box: Box
    target: torch.Tensor

    @property
    def bytes(self) -> int:
        return math.prod(self.wide.lengths) * self.found.dtype.itemsize

    def cut(self, held: torch.Tensor) -> torch.Tensor:
        offsets = [low - first for low, first in zip(self.box.offsets, self.wide.offsets, strict=True)]
        return narrow_tensor_by_index(held, offsets, self.box.lengths)


class Entry(NamedTuple):
    """A stored object that is no tensor, still pickled.

    Attributes:
        item: what is asked for.
        info: its place.
        stored: its bytes.
        given: what the planner gets to unpickle.
    """

    item: ReadItem
    info: _StorageInfo
    stored: io.BytesIO
    given: io.BytesIO


@dataclass
class Reading:
    """What one rank reads. ``locate`` and ``verify`` touch no tensor.

    Attributes:
        contents: the checkpoint.
        reads: the tensors.
        entries: the other objects.
        planner: what puts things into the state dict.
        threads: that read.
    """

    contents: Contents
    reads: Sequence[Read]
    entries: Sequence[Entry]
    planner: LoadPlanner
    threads: int
    plain: list[Plain | None] = field(default_factory=list)

    def locate(self) -> None:
        """Find each tensor's bytes within its blob.

        Raises:
            LoadError: a blob holds another shape or dtype than the checkpoint says.
        """
        heads: dict[tuple[str, int], tuple[_StorageInfo, bytearray]] = {}
        for one in self.reads:
            if not one.info.transform_descriptors:
                heads[_place(one)] = one.info, bytearray(min(HEAD, one.info.length))
        with self._named():
            fetch(
                (Fetch(self.contents.file(info), info.offset, memoryview(head)) for info, head in heads.values()),
                self.threads,
            )
        found = {place: plain(bytes(head), info.length) for place, (info, head) in heads.items()}
        self.plain = [self._located(one, found.get(_place(one))) for one in self.reads]

    def _located(self, one: Read, found: Plain | None) -> Plain | None:
        if is_raw(one.info):
            return self._raw_stretch(one)
        if found is not None and one.shape is not None and (found.shape, found.dtype) != (tuple(one.shape), one.dtype):
            raise self._damaged(one, f"it holds a {found.dtype} of shape {found.shape} there")
        return found

    def _raw_stretch(self, one: Read) -> Plain:
        """Return where all of a blob is the tensor's bytes."""
        shape, dtype = one.shape, one.dtype
        if isinstance(one.info, Described):
            shape, dtype = one.info.shape, one.info.dtype
        if shape is None or dtype is None or bytes_of(shape, dtype) != one.info.length:
            raise self._damaged(one, f"its {one.info.length} bytes there are not those of its shape")
        return Plain(0, tuple(shape), dtype)

    # Filling tensors ---------------------------------------------------------------------

    def fill(self, targets: Sequence[torch.Tensor]) -> None:
        """Read every tensor into its own target, of the shape that ``reads`` has and on any device."""
        straight: list[Fetch] = []
        staged: list[tuple[Read, Plain, torch.Tensor]] = []
        for one, found, target in zip(self.reads, self.plain, targets, strict=True):
            if found is None:
                self._fill_unpickled(one, target)
                continue
            box = _box(one, found)
            runs = _runs_straight(box, target, found.dtype)
            if runs is None:
                staged.append((one, found, target))
            else:
                straight += self._fetches(one, found, target, runs)
        with self._named():
            fetch(straight, self.threads)
        self._fill_staged(staged)

    def _fetches(self, one: Read, found: Plain, target: torch.Tensor, runs: Runs) -> Iterator[Fetch]:
        path, start, width = self.contents.file(one.info), one.info.offset + found.start, found.dtype.itemsize
        memory, first = _memory(target), target.storage_offset() * width
        length = runs.length * width
        for source, place in zip((runs.sources * width).tolist(), (runs.targets * width).tolist(), strict=True):
            yield Fetch(path, start + source, memory[first + place : first + place + length])

    def _fill_staged(self, staged: Sequence[tuple[Read, Plain, torch.Tensor]]) -> None:
        """Read a bounded part at a time into memory of our own, and let torch bring it to where it belongs."""
        pieces = [
            _Piece(
                one, found, piece.widened() if piece.shortest_run * found.dtype.itemsize < _SMALL else piece, piece, to
            )
            for one, found, target in staged
            for piece, to in _pieces(_box(one, found), target, found.dtype.itemsize)
        ]
        with Staging(_STAGED) as staging:
            for part in batches(pieces, _STAGED, lambda piece: piece.bytes):
                held = staging.room([piece.bytes for piece in part], [piece.target.device for piece in part])
                rooms = [memory.view(p.found.dtype).view(p.wide.lengths) for p, memory in zip(part, held, strict=True)]
                fetches: list[Fetch] = []
                for piece, room in zip(part, rooms, strict=True):
                    runs = _runs_into(piece.wide, room)
                    assert runs is not None  # rows of a row-major tensor into another
                    fetches += self._fetches(piece.one, piece.found, room, runs)
                with self._named():
                    fetch(fetches, self.threads)
                staging.send([(piece.target, piece.cut(room)) for piece, room in zip(part, rooms, strict=True)])

    def _fill_unpickled(self, one: Read, target: torch.Tensor) -> None:
        """Read what is no plain tensor as DCP itself does, though never running anything."""
        loaded = Checkpoint(self.contents).blob(one.key, one.info)
        if not isinstance(loaded, torch.Tensor):
            raise self._damaged(one, f"it holds a {type(loaded).__name__} there")
        if one.shape is not None and tuple(loaded.shape) != tuple(one.shape):
            raise self._damaged(one, f"it holds a tensor of shape {tuple(loaded.shape)} there")
        target.copy_(narrow_tensor_by_index(loaded, one.item.storage_offsets, one.item.lengths))

    def move(self, values: Sequence[torch.Tensor]) -> None:
        """Put what was read beside the tensors into them."""
        for _ in self._each(lambda pair: pair[0].target.copy_(pair[1]), list(zip(self.reads, values, strict=True))):
            pass

    def commit(self) -> None:
        """Tell the planner that its tensors are filled, and give it everything else."""
        for one in self.reads:
            self.planner.commit_tensor(one.item, one.target)
        for entry in self.entries:
            self.planner.load_bytes(entry.item, entry.given)

    # Checksums ---------------------------------------------------------------------------

    def verify(self) -> None:
        """Compare the checksum of every blob: the whole blob's where the record has it, else its zip archive's.

        safetensors files, which a linked checkpoint may have, hold no checksums.

        Raises:
            LoadError: one differs.
        """
        blobs = {
            (one.info.relative_path, one.info.offset): (one, n)
            for one, n in zip(self.reads, self.plain, strict=True)
            if not is_raw(one.info)
        }
        for _ in self._each(lambda blob: self._verify(*blob), list(blobs.values())):
            pass
        for _ in self._each(lambda held: self._verify_archived(*held), list(self._archived().items())):
            pass
        for entry in self.entries:
            self._verify_entry(entry)

    def _verify(self, one: Read, found: Plain | None) -> None:
        info, record = one.info, self.contents.base.record
        path = self.contents.file(info)
        known = record.crcs.get(info.relative_path, {}).get(info.offset) if record else None
        with self._named(one):
            if known is not None:
                good = _crc(path, info.offset, info.length) == known
            elif found is not None:
                stored = self._descriptor(one, found)
                good = _crc(path, info.offset + found.start, found.bytes) == stored
                if not good and stored == 0:
                    raise LoadError(
                        f"{path} has no checksum of {self.contents.described(one.key)}, as torch was told to write "
                        f"none; load it without verify=True."
                    )
            else:
                good = _archive_is_good(self._raw(info))
        if not good:
            raise self._damaged(one, "its checksum differs")

    def _archived(self) -> dict[tuple[Path, Archived], Read]:
        """Return the records of other programs' archives that hold raw stretches, and one of these for each."""
        held: dict[tuple[Path, Archived], Read] = {}
        files: dict[Path, Sequence[Archived]] = {}
        for one in (one for one in self.reads if is_raw(one.info)):
            path = self.contents.file(one.info)
            if path not in files:
                with self._named(one):
                    files[path] = archived_in(path)
            for record in touched(files[path], one.info.offset, one.info.length):
                held.setdefault((path, record), one)
        return held

    def _verify_archived(self, place: tuple[Path, Archived], one: Read) -> None:
        path, record = place
        with self._named(one):
            good = _crc(path, record.start, record.length) == record.crc
        if not good:
            raise self._damaged(one, "its checksum differs")

    def _descriptor(self, one: Read, found: Plain) -> int:
        """Return the CRC-32 that stands behind the tensor's bytes in the archive."""
        raw = bytearray(8)
        read_file(self.contents.file(one.info), one.info.offset + found.start + found.bytes, memoryview(raw))
        return int.from_bytes(raw[4:], "little") if raw[:4] == b"PK\x07\x08" else -1

    def _verify_entry(self, entry: Entry) -> None:
        record = self.contents.base.record
        info = entry.info
        known = record.crcs.get(info.relative_path, {}).get(info.offset) if record else None
        raw = entry.stored.getvalue()
        if not (crc32(raw) == known if known is not None else _archive_is_good(raw)):
            key = entry.item.storage_index.fqn
            raise LoadError(
                f"{self.contents.file(info)} has changed since it was written: the checksum of "
                f"{self.contents.described(key)} differs; use another checkpoint."
            )

    def _raw(self, info: _StorageInfo) -> bytes:
        raw = bytearray(info.length)
        read_file(self.contents.file(info), info.offset, memoryview(raw))
        return bytes(raw)

    # Around them -------------------------------------------------------------------------

    def _each(self, do: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R]:
        if self.threads == 1 or len(items) < 2:
            yield from map(do, items)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            yield from pool.map(do, items)

    @contextmanager
    def _named(self, one: Read | None = None) -> Iterator[None]:
        """Say which layer and step a file that cannot be read was needed for."""
        try:
            yield
        except DamagedSourceError as error:
            of = f" ({self.contents.described(one.key)})" if one else ""
            raise LoadError(f"{str(error).rstrip('.')}{of}.") from error

    def _damaged(self, one: Read, why: str) -> LoadError:
        return LoadError(
            f"{self.contents.file(one.info)} is damaged: {self.contents.described(one.key)} cannot be read, as {why}; "
            f"take that layer from another step with LayerwiseLoadPlanner(steps=...)."
        )


def _place(one: Read) -> tuple[str, int]:
    return one.info.relative_path, one.info.offset


def _box(one: Read, found: Plain) -> Box:
    return Box(found.shape, tuple(one.item.storage_offsets), tuple(one.item.lengths))


def _runs_straight(box: Box, target: torch.Tensor, dtype: torch.dtype) -> Runs | None:
    """Return the stretches to read from a file into a tensor; None if its memory does not hold what it is."""
    if target.device.type != "cpu" or target.dtype != dtype or target.is_conj() or target.is_neg():
        return None
    return _runs_into(box, target) if target.layout == torch.strided else None


def _runs_into(box: Box, target: torch.Tensor) -> Runs | None:
    """Return the stretches to read into a tensor; None if they are too short to be read one by one."""
    runs = runs_of(box, target.stride())
    if runs is None or (len(runs.sources) > 1 and runs.length * target.dtype.itemsize < _SMALL and not box.is_rows):
        return None
    return runs


def _pieces(box: Box, target: torch.Tensor, width: int) -> Iterator[tuple[Box, torch.Tensor]]:
    """Cut a box, and the tensor that it goes into, along the outermost dimension."""
    if not box.lengths:
        yield box, target
        return
    row = max(1, math.prod(box.stored[1:]) * width)
    step = max(1, _STAGED // row)
    for start in range(0, box.lengths[0], step):
        count = min(step, box.lengths[0] - start)
        offsets = (box.offsets[0] + start, *box.offsets[1:])
        yield Box(box.stored, offsets, (count, *box.lengths[1:])), target.narrow(0, start, count)


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor's storage on the CPU."""
    array: Any = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return memoryview(array)


def _crc(path: Path, offset: int, length: int) -> int:
    window, crc = memoryview(bytearray(min(_WINDOW, length))), 0
    for start in range(0, length, _WINDOW):
        part = window[: min(_WINDOW, length - start)]
        read_file(path, offset + start, part)
        crc = crc32(part, crc)
    return crc


def _archive_is_good(raw: bytes) -> bool:
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, ValueError, OSError, RuntimeError, EOFError, zlib.error):
        return False
