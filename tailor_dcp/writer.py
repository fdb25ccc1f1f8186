"""``LayerwiseWriter``: a DCP storage writer that gives bytes of one lifetime a file of their own."""

from __future__ import annotations

import os
import pickle
import queue
from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
    FileSystem,
    _item_size,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tailor_dcp.carry import sync_folder
from tailor_dcp.crc import ChecksumStream
from tailor_dcp.location import METADATA
from tailor_dcp.metadata.record import ATTRIBUTE
from tailor_dcp.planner import REST, LayerwisePlanner

_SMALLEST_PART = 64 << 20  # bytes; below this a second file costs more than a second thread gains


@dataclass(frozen=True)
class CheckedResult(WriteResult):
    """DCP's result of one blob, and the blob's CRC-32."""

    crc: int


class _ChecksumFileSystem(FileSystem):
    """Local files whose blobs' CRCs are noted while they are written."""

    def __init__(self) -> None:
        self.crcs: dict[str, dict[int, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as raw:
            if mode != "wb":
                yield raw
                return
            stream = ChecksumStream(cast(IO[bytes], raw))
            yield stream
            self.crcs[Path(path).name] = stream.blobs


class LayerwiseWriter(FileSystemWriter):
    """Writes each group of units that is due together to files of its own.

    With the stock writer a rank's bytes share one file, so a single carried unit keeps the
    whole file on disk. Here weights and moments are apart, and moments are grouped as the
    policy rewrites them, so that a carried file is live as a whole. Folders are fsynced,
    blobs have checksums, no empty file is written, and the commit is one ``os.replace``: an
    earlier checkpoint in the same folder is there until the new one is.

    With another planner than ``LayerwisePlanner`` it writes what ``FileSystemWriter`` does.

    Args:
        path: the checkpoint's folder.
        thread_count: threads that write, each to a file of its own. Two overlap computing
            checksums with writing.
        sync_files: fsync files and folders. Without it a crash of the machine may lose the
            checkpoint.
        overwrite: allow saving into a folder that holds a checkpoint.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thread_count: int = 2,
        sync_files: bool = True,
        overwrite: bool = True,
    ) -> None:
        super().__init__(path, thread_count=thread_count, sync_files=sync_files, overwrite=overwrite)
        self._checksums = _ChecksumFileSystem()
        self.fs = self._checksums

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, a file or more for each cohort of units."""
        prefix: _StoragePrefix = plan.storage_data
        self._checksums.crcs = {}
        files: queue.Queue[tuple[Path, str, list[WriteItem]]] = queue.Queue()
        for number, items in enumerate(_files(plan.items, planner, self.thread_count)):
            name = f"{prefix.prefix}{number}{DEFAULT_SUFFIX}"
            files.put((Path(self.path) / name, name, items))
        results = self._write_data(planner, files).wait()
        if self.sync_files:
            sync_folder(Path(self.path))
        future: Future[list[WriteResult]] = Future()
        future.set_result([self._checked(result) for result in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: the checkpoint is there as soon as ``.metadata`` has its name."""
        if not self.use_collectives:  # a stock planner's, then: every rank has a metadata file of its own
            super().finish(metadata, results)
            return
        metadata.version = CURRENT_DCP_VERSION
        written = [result for of_rank in results for result in of_rank]
        metadata.storage_data = {result.index: result.storage_data for result in written}
        metadata.storage_meta = self.storage_meta()
        _note_checksums(metadata, written)
        folder = Path(self.path)
        partial = folder / f"{METADATA}.tmp"
        with partial.open("wb") as stream:
            pickle.dump(metadata, stream)
            stream.flush()
            if self.sync_files:
                os.fsync(stream.fileno())
        partial.replace(folder / METADATA)
        if self.sync_files:
            sync_folder(folder)
            sync_folder(folder.parent)

    def _checked(self, result: WriteResult) -> CheckedResult:
        info = result.storage_data
        crc = self._checksums.crcs[info.relative_path][info.offset]
        return CheckedResult(result.index, result.size_in_bytes, info, crc)


def _files(items: Iterable[WriteItem], planner: SavePlanner, parts: int) -> list[list[WriteItem]]:
    """Deal items to files: one lifetime a file, large ones in parts so that all threads have work."""
    cohort = planner.cohort if isinstance(planner, LayerwisePlanner) else lambda _: REST
    groups: dict[str, list[WriteItem]] = defaultdict(list)
    for item in items:
        groups[cohort(item.index.fqn)].append(item)
    files = [part for _, group in sorted(groups.items()) for part in _split(group, parts)]
    return sorted(files, key=_bytes, reverse=True)  # the largest first, so that threads end together


def _split(items: list[WriteItem], parts: int) -> list[list[WriteItem]]:
    if _bytes(items) < parts * _SMALLEST_PART:
        return [items]
    dealt: list[list[WriteItem]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for item in sorted(items, key=_size, reverse=True):
        least = sizes.index(min(sizes))
        dealt[least].append(item)
        sizes[least] += _size(item)
    return [part for part in dealt if part]


def _size(item: WriteItem) -> int:
    return 0 if item.type == WriteItemType.BYTE_IO else _item_size(item)


def _bytes(items: Iterable[WriteItem]) -> int:
    return sum(_size(item) for item in items)


def _note_checksums(metadata: Metadata, written: Iterable[WriteResult]) -> None:
    record = getattr(metadata, ATTRIBUTE, None)
    if record is None:
        return
    for result in written:
        if isinstance(result, CheckedResult):
            info = result.storage_data
            record["crcs"].setdefault(info.relative_path, {})[info.offset] = result.crc
