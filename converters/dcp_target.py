"""Writing a DCP checkpoint: planned by the same planner as a training's saves, streamed by a writer of its own."""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tailor_dcp import lineage
from tailor_dcp.carry import sync_folder
from tailor_dcp.catalog import Catalog
from tailor_dcp.companions import give_files, put_files
from tailor_dcp.coordination import RankInfo
from tailor_dcp.crc import combine, crc32
from tailor_dcp.errors import ConversionError, TailorError
from tailor_dcp.frames import frame
from tailor_dcp.location import locate
from tailor_dcp.planner import LayerwisePlanner
from tailor_dcp.tensors import Given, Readable
from tailor_dcp.writer import CheckedResult, LayerwiseWriter

from . import ranks
from .accelerate_folder import write_scheduler
from .dcp_state import Planned, flat_start, planned_in, state_dict
from .filling import Stretch, windows, write_at
from .formats import target_of
from .key_layouts import parts_of
from .options import Options, Progress

_FRAMED = 1 << 16
"""Bytes; a smaller tensor is simply given to ``torch.save``."""
_LARGEST_FILE = 4 << 30
_THREADS = 2


def write(catalog: Catalog, place: Path, final: Path, options: Options) -> Sequence[str]:
    """Write a checkpoint that plain ``dcp.load`` reads and that later saves can carry from.

    Args:
        catalog: what to write.
        place: the folder to make.
        final: the name that it will have.
        options: the layout of keys, and whom to tell of progress.

    Raises:
        ConversionError: the disk is full, or the like.
        DamagedSourceError: a source cannot be read.
    """
    told = catalog.train.get("step")
    step = told if isinstance(told, int) else None
    for folder, state in parts_of(state_dict(catalog), options.keys).items():
        save(state, StreamingWriter(place / folder, final / folder, options.progress), step)
    if options.keys == "transformers":
        notes = target_of("hf").write(replace(catalog, state={}, groups=()), place, final, options)
        return (*notes, *_left_out(catalog, ()))
    ranks.together(lambda: put_beside(catalog, place, options) if ranks.rank() == 0 else None)
    return _left_out(catalog, ("scheduler",)) if options.keys == "accelerate" else ()


def put_beside(catalog: Catalog, place: Path, options: Options) -> None:
    """Give a checkpoint the files that belong to it."""
    place.mkdir(exist_ok=True)
    if options.keys == "accelerate":
        give_files(catalog.files, place)
        write_scheduler(catalog, place)
    else:
        put_files(catalog.files, place)


def _left_out(catalog: Catalog, kept: Sequence[str]) -> tuple[str, ...]:
    """Say what a layout of keys has no place for."""
    lost = [f"train.{name}" for name in catalog.train if name not in kept]
    return (f"{', '.join(lost)} has no place in this layout and is not written.",) if lost else ()


def save(state: dict[str, Any], writer: StreamingWriter, step: int | None = None) -> None:
    """Save a state dict of what is not there; all ranks call it.

    Args:
        state: what to save.
        writer: where.
        step: the training step, for folders whose name does not tell one.

    Raises:
        TailorError: whatever went wrong on any of them.
    """
    final = writer.final
    try:
        with lineage.aside(), warnings.catch_warnings():  # what is converted is not what this process trains
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
            dcp.save(state, storage_writer=writer, planner=_ConversionPlanner(final, step), no_dist=ranks.world() == 1)
    except CheckpointException as error:  # what went wrong inside, without DCP's traceback around it
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, TailorError) else ConversionError(f"{final}: {cause}") from error


class _ConversionPlanner(LayerwisePlanner):
    """Plans a full save of tensors that are not there, under the name that the folder will have."""

    def __init__(self, final: Path, step: int | None) -> None:
        super().__init__("full", base=None)
        self._final, self._step = final, step

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        here = locate(self._final)
        self._target = here if here.step is not None else replace(here, step=self._step)

    def create_local_plan(self) -> SavePlan:
        """Add the names that share one tensor, which DCP cannot see here."""
        plan = super().create_local_plan()
        names: dict[int, list[str]] = {}
        for key, planned in planned_in(self.state_dict):
            names.setdefault(id(planned.tensor), []).append(key)
        info = cast(RankInfo, plan.planner_data)
        ties = tuple(tuple(keys) for keys in names.values() if len(keys) > 1)
        return replace(plan, planner_data=replace(info, ties=ties))


@dataclass(frozen=True)
class _Blob:
    """A chunk to write: the items that it is stored for, tied names together, and its place."""

    items: tuple[WriteItem, ...]
    file: str
    offset: int
    length: int
    tensor: Readable
    start: int
    shape: tuple[int, ...]


class StreamingWriter(LayerwiseWriter):
    """Writes chunks a window at a time, so that memory does not depend on how large they are."""

    def __init__(self, place: Path, final: Path, progress: Progress) -> None:
        super().__init__(place)
        self.final = final
        self.progress = progress

    def storage_meta(self) -> StorageMeta:
        """Name the folder as it will be called."""
        return StorageMeta(checkpoint_id=str(self.final), save_id=self.save_id)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's share."""
        prefix: _StoragePrefix = plan.storage_data
        state = cast(LayerwisePlanner, planner).state_dict
        results = self._write_values([i for i in plan.items if i.type == WriteItemType.BYTE_IO], prefix.prefix, planner)
        results += self._write_tensors(_laid_out(plan.items, state, prefix.prefix))
        sync_folder(Path(self.path))
        future: Future[list[WriteResult]] = Future()
        future.set_result(cast(list[WriteResult], results))
        return future

    def _write_values(self, items: Sequence[WriteItem], prefix: str, planner: SavePlanner) -> list[CheckedResult]:
        """Write what is no tensor to a file of its own."""
        name, results, offset = f"{prefix}values{DEFAULT_SUFFIX}", [], 0
        blobs = [(item, cast(io.BytesIO, planner.resolve_data(item)).getvalue()) for item in items]
        if blobs:
            with (Path(self.path) / name).open("xb") as stream:
                for item, data in blobs:
                    stream.write(data)
                    info = _StorageInfo(name, offset, len(data))
                    results.append(CheckedResult(item.index, len(data), info, crc32(data)))
                    offset += len(data)
                stream.flush()
                os.fsync(stream.fileno())
        return results

    def _write_tensors(self, blobs: Sequence[_Blob]) -> list[CheckedResult]:
        files: dict[str, list[_Blob]] = {}
        for blob in blobs:
            files.setdefault(blob.file, []).append(blob)
        stop = threading.Event()
        with ThreadPoolExecutor(_THREADS) as pool:
            work = [pool.submit(self._write_file, name, held, stop) for name, held in files.items()]
            try:
                return [result for done in work for result in done.result()]
            except BaseException:
                stop.set()
                raise

    def _write_file(self, name: str, blobs: Sequence[_Blob], stop: threading.Event) -> list[CheckedResult]:
        path = Path(self.path) / name
        results: list[CheckedResult] = []
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for blob in blobs:
                if stop.is_set():
                    break
                crc = self._write_blob(target, path, blob)
                info = _StorageInfo(name, blob.offset, blob.length)
                results += [CheckedResult(item.index, blob.length, info, crc) for item in blob.items]
            os.fsync(target)
        except OSError as error:
            raise ConversionError(f"{path.name} cannot be written to {path.parent}: {error.strerror}.") from error
        finally:
            os.close(target)
        return results

    def _write_blob(self, target: int, path: Path, blob: _Blob) -> int:
        """Write one archive and return its CRC-32."""
        count = math.prod(blob.shape)
        if count * blob.tensor.dtype.itemsize < _FRAMED:
            data = _saved(blob.tensor.read(blob.start, blob.start + count).reshape(blob.shape))
            write_at(target, memoryview(data), blob.offset, path)
            self.progress(count * blob.tensor.dtype.itemsize)
            return crc32(data)
        before, _ = frame(blob.shape, blob.tensor.dtype, 0)
        stretch = Stretch(path, blob.offset + len(before), blob.tensor, blob.start, blob.start + count)
        crc = 0
        for offset, window in windows(stretch):
            crc = crc32(window, crc)
            write_at(target, window, offset, path)
            self.progress(len(window))
        before, after = frame(blob.shape, blob.tensor.dtype, crc)
        write_at(target, memoryview(before), blob.offset, path)
        write_at(target, memoryview(after), stretch.offset + stretch.bytes, path)
        return combine(combine(crc32(before), crc, stretch.bytes), crc32(after), len(after))


def _laid_out(items: Sequence[WriteItem], state: dict[str, Any], prefix: str) -> list[_Blob]:
    """Give each chunk its place: tied names share one, and a file is not larger than it should be."""
    chunks: dict[tuple[int, torch.Size], list[WriteItem]] = {}
    tensors: dict[str, Readable] = {}
    for item in items:
        if item.tensor_data is not None:
            tensor = tensors.setdefault(item.index.fqn, _readable(state[item.index.fqn]))
            chunks.setdefault((id(tensor), item.tensor_data.chunk.offsets), []).append(item)
    share = sum(map(_stored_bytes, chunks.values())) // _THREADS + 1
    blobs: list[_Blob] = []
    number, offset = 0, 0
    for same in chunks.values():
        data = same[0].tensor_data
        assert data is not None
        tensor, shape = tensors[same[0].index.fqn], tuple(data.chunk.sizes)
        if offset >= min(share, _LARGEST_FILE):
            number, offset = number + 1, 0
        length = _length(tensor.dtype, shape)
        start = flat_start(tensor.size, tuple(data.chunk.offsets))
        blobs.append(_Blob(tuple(same), f"{prefix}{number}{DEFAULT_SUFFIX}", offset, length, tensor, start, shape))
        offset += length
    return blobs


def _readable(value: Any) -> Readable:
    """Return where an item's bytes come from; a learning rate can be a tensor, and is simply there."""
    return value.tensor if isinstance(value, Planned) else Given(value.detach())


def _stored_bytes(same: Sequence[WriteItem]) -> int:
    data = same[0].tensor_data
    return _length(data.properties.dtype, tuple(data.chunk.sizes)) if data else 0


@lru_cache(maxsize=4096)
def _length(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Return the bytes of a chunk's archive."""
    count = math.prod(shape) * dtype.itemsize
    if count < _FRAMED:
        return len(_saved(torch.zeros(shape, dtype=dtype)))
    before, after = frame(shape, dtype, 0)
    return len(before) + count + len(after)


def _saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()
