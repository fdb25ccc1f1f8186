"""``LayerwiseWriter``: a DCP storage writer that gives bytes of one lifetime a file of their own."""

from __future__ import annotations

import os
import queue
from collections import defaultdict
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
    FileSystem,
    FileSystemBase,
    _item_size,
    _StoragePrefix,
    _write_files_from_queue,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tailor_dcp.carry import check_there, make_folder, open_anew, sync_folder
from tailor_dcp.crc import ChecksumStream
from tailor_dcp.errors import TailorError
from tailor_dcp.location import METADATA
from tailor_dcp.locks import alone_in
from tailor_dcp.metadata.compose import sign
from tailor_dcp.metadata.pickle_writer import dump, dumps
from tailor_dcp.metadata.record import ATTRIBUTE, packed
from tailor_dcp.planner import REST, LayerwisePlanner
from tailor_dcp.stores import is_url, place, writing

_SMALLEST_PART = 64 << 20  # bytes; below this a second file costs more than a second thread gains


class WriteFailedError(TailorError):
    """A store did not take what was to be written; what was there before is untouched."""


def _cannot_write(path: str | os.PathLike[str], error: OSError) -> WriteFailedError:
    why = error.strerror or error
    return WriteFailedError(f"{os.fspath(path)} cannot be written: {why}; nothing was committed, save again.")


@dataclass(frozen=True)
class CheckedResult(WriteResult):
    """DCP's result of one blob, and the blob's CRC-32."""

    crc: int


class _ChecksumFileSystem(FileSystem):
    """Local files whose blobs' CRCs are noted while they are written."""

    def __init__(self, sync: bool) -> None:
        self.crcs: dict[str, dict[int, int]] = {}
        self._sync = sync

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        if self._sync:
            make_folder(Path(path))
        else:
            super().mkdir(path)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        if mode != "wb":
            with super().create_stream(path, mode) as raw:
                yield raw
            return
        try:
            with super().create_stream(path, mode) as raw:
                stream = ChecksumStream(cast(IO[bytes], raw))
                yield stream
                self.crcs[Path(path).name] = stream.blobs
        except OSError as error:
            raise _cannot_write(path, error) from error


class _Store(FileSystemBase):
    """Objects of a store, there whole or not at all, whose blobs' CRCs are noted while they are written."""

    def __init__(self) -> None:
        self.crcs: dict[str, dict[int, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        where = place(path)
        if mode != "wb":
            with where.open(mode) as raw:
                yield raw
            return
        try:
            with writing(where) as raw:
                stream = ChecksumStream(cast(IO[bytes], raw))
                yield stream
                self.crcs[where.name] = stream.blobs
        except OSError as error:
            raise _cannot_write(where, error) from error

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> Path:
        return place(path) / suffix

    def init_path(self, path: str | os.PathLike[str]) -> Path:
        return place(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        raise NotImplementedError("objects are put under their own names")

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing: a store has no folders."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_url(checkpoint_id)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return place(path).exists()

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        place(path).unlink()


class LayerwiseWriter(FileSystemWriter):
    """Writes each group of units that is due together to files of its own.

    With the stock writer a rank's bytes share one file, so a single carried unit keeps the
    whole file on disk. Here weights and moments are apart, and moments are grouped as the
    policy rewrites them, so that a carried file is live as a whole. Folders are fsynced,
    blobs have checksums, no empty file is written, and the commit is one ``os.replace``: an
    earlier checkpoint in the same folder is there until the new one is.

    With another planner than ``LayerwisePlanner`` it writes what ``FileSystemWriter`` does.

    Args:
        path: the checkpoint's folder, or its URL on any store of fsspec's. There each object appears when it is
            complete, large ones are uploaded in parts, and the commit is the PUT of ``.metadata``.
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
        # A store keeps what it has answered for; DCP would flush all of this machine's disks instead.
        sync_files = sync_files and not is_url(path)
        local = path if is_url(path) else place(path)
        super().__init__(local, thread_count=thread_count, sync_files=sync_files, overwrite=overwrite)
        self._take(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew, maybe with another checkpoint."""
        if checkpoint_id:
            self._take(checkpoint_id)
        super().reset(None)

    def _take(self, path: str | os.PathLike[str]) -> None:
        self._checksums: _Store | _ChecksumFileSystem = (
            _Store() if is_url(path) else _ChecksumFileSystem(self.sync_files)
        )
        self.fs: Any = self._checksums
        self.path = place(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether a checkpoint can be written there."""
        return is_url(checkpoint_id) or super().validate_checkpoint_id(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """Return what the checkpoint is called and the save's id."""
        return StorageMeta(checkpoint_id=str(self.path) if is_url(self.path) else self.path, save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, a file or more for each cohort of units."""
        prefix: _StoragePrefix = plan.storage_data
        self._checksums.crcs = {}
        files: queue.Queue[tuple[Path, str, list[WriteItem]]] = queue.Queue()
        for number, items in enumerate(_files(plan.items, planner, self.thread_count)):
            name = f"{prefix.prefix}{number}{DEFAULT_SUFFIX}"
            files.put((place(self.path) / name, name, items))
        results = self._write_files(planner, files)
        if self.sync_files:
            sync_folder(place(self.path))
        future: Future[list[WriteResult]] = Future()
        future.set_result([self._checked(result) for result in results])
        return future

    def _write_files(
        self, planner: SavePlanner, files: queue.Queue[tuple[Path, str, list[WriteItem]]]
    ) -> list[WriteResult]:
        """Write as DCP does, but let what goes wrong in a thread be heard."""
        done: queue.Queue[list[WriteResult]] = queue.Queue()

        def work() -> None:
            _write_files_from_queue(
                self.fs.create_stream,
                files,
                done,
                planner,
                self.transforms,
                self.per_thread_copy_ahead,
                self.sync_files,
                self.thread_count,
                self.serialization_format,
            )

        with ThreadPoolExecutor(max(1, self.thread_count - 1)) as pool:
            others = [pool.submit(work) for _ in range(1, self.thread_count)]
            work()
            for other in others:
                other.result()
        results: list[WriteResult] = []
        while not done.empty():
            results += done.get_nowait()
        return results

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
        sign(metadata)
        folder = place(self.path)
        if is_url(folder):
            self._put(metadata, folder / METADATA)
            return
        try:
            with alone_in(folder):
                self._commit(metadata, folder)
        except OSError as error:
            raise _cannot_write(folder / METADATA, error) from error

    def _commit(self, metadata: Metadata, folder: Path) -> None:
        check_there(metadata, folder)
        partial = folder / f"{METADATA}.tmp"
        with open_anew(partial) as stream:
            dump(metadata, stream)
            stream.flush()
            if self.sync_files:
                os.fsync(stream.fileno())
        partial.replace(folder / METADATA)
        if self.sync_files:
            _keep(folder)

    def _put(self, metadata: Metadata, path: Path) -> None:
        try:
            path.write_bytes(dumps(metadata))
        except OSError as error:
            raise _cannot_write(path, error) from error

    def _checked(self, result: WriteResult) -> CheckedResult:
        info = result.storage_data
        crc = self._checksums.crcs[info.relative_path][info.offset]
        return CheckedResult(result.index, result.size_in_bytes, info, crc)


def _keep(folder: Path) -> None:
    """Have the name of what was committed on the disk, also if power fails."""
    try:
        sync_folder(folder)
        sync_folder(folder.parent)
    except OSError as error:
        why = error.strerror or error
        raise WriteFailedError(
            f"{folder} was written whole, but the disk does not confirm that it will stay: {why}; a loss of power may "
            f"undo it, so see to the disk and save again."
        ) from error


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
    crcs: dict[str, dict[int, int]] = {}
    for result in written:
        if isinstance(result, CheckedResult):
            info = result.storage_data
            crcs.setdefault(info.relative_path, {})[info.offset] = result.crc
    record["crcs"].update({file: packed(blobs) for file, blobs in crcs.items()})
