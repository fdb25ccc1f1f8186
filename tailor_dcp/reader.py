"""LayerwiseReader: a DCP storage reader that reads bytes straight into the tensors they belong to."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from tailor_dcp.base import Base
from tailor_dcp.contents import Contents
from tailor_dcp.entries import pickled_anew
from tailor_dcp.errors import LoadError
from tailor_dcp.load_planner import LayerwiseLoadPlanner
from tailor_dcp.location import METADATA, locate
from tailor_dcp.metadata.compose import chunk_shape
from tailor_dcp.metadata.record import record_of, save_id_of
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.open_checkpoint import Checkpoint
from tailor_dcp.open_files import close_files
from tailor_dcp.reading import Entry, Read, Reading
from tailor_dcp.store_path import place
from tailor_dcp.unpickling import Admitted, allowed

_UNPICKLING = (DefaultLoadPlanner.load_bytes, LayerwiseLoadPlanner.load_bytes)
"""How planners take objects over that were stored as DCP stores them; others may keep them in any form."""


class LayerwiseReader(StorageReader):
    """Reads DCP checkpoints, composites included, several times as fast as ``FileSystemReader``.

    ``dcp.load(state, storage_reader=LayerwiseReader("run/step-200"))``. Only the bytes that this rank needs are read,
    and they go straight into its tensors: no blob is unpickled, and nothing is copied in between. What is stored in
    any other way than as plain contiguous tensors is read as DCP itself does. Before the first byte goes into a
    tensor, the files, their sizes, shapes and dtypes of everything that this rank reads are checked, and that no object
    runs code when it is unpickled: DCP's own planner would let it.

    Args:
        path: the checkpoint's folder, or its URL on any store of fsspec's (``s3://bucket/run/step-200``): of each
            object only the ranges that are needed are asked for, many at a time.
        verify: also compare the checksums of all blobs that are read before any tensor is touched.
        atomic: read everything beside the tensors first, and put it into them only when all ranks have it: a load
            that fails leaves every rank's tensors as they were. Takes as much memory again.
        cast: let torch convert where the checkpoint's dtype is not the tensor's. A dtype that the save itself
            narrowed always comes back as it was in training.
        allow: classes that objects may be of, as such or as ``"module.Class"``, beside those of torch, numpy and the
            standard library that training states have. Allow only what you trust the checkpoint's writer with.
        threads: that read; None for as many as there are cores, four at most.
        process_group: the ranks that load, where these are not all; only ``atomic`` asks them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        verify: bool = False,
        atomic: bool = False,
        cast: bool = False,
        allow: Iterable[str | type] = (),
        threads: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.path = place(path)
        self.verify, self.atomic, self.cast = verify, atomic, cast
        self._admitted = allowed(allow)
        self.threads = threads or min(4, _cores())
        self.process_group = process_group
        self._metadata: Metadata | None = None
        self._load_id = str(uuid.uuid4())

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The checkpoint's folder; DCP names it in its events."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether a checkpoint can be there."""
        return place(checkpoint_id).exists()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew, maybe with another checkpoint."""
        if checkpoint_id:
            self.path = place(checkpoint_id)
        self._metadata = None
        self._load_id = str(uuid.uuid4())

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the checkpoint's metadata, running nothing that is in it.

        Raises:
            NoCheckpointError: it is not committed.
            UnreadableMetadataError: it is damaged or hostile.
        """
        rank = kwargs.get("rank")
        metadata = read(self.path / (METADATA if rank is None else f"__{rank}{METADATA}"))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self._load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take over the metadata, which a load planner may have added places to."""
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Tell every rank how many take part: only then can they wait for each other."""
        return [_with_ranks(plan, len(plans)) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs.

        Raises:
            LoadError: a file is missing, too short or damaged, or a dtype or shape differs.
        """
        ranks = plan.storage_data if isinstance(plan.storage_data, int) else 1
        try:
            if self.atomic:
                self._read_beside(plan, planner, ranks)
            else:
                reading = self._reading(plan, planner)
                reading.fill([one.target for one in reading.reads])
                reading.commit()
        finally:
            close_files()  # what is removed while it is open goes on taking room on the disk
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_beside(self, plan: LoadPlan, planner: LoadPlanner, ranks: int) -> None:
        """Read into memory of its own, and go on when all ranks have done so."""
        problem: BaseException | None = None
        try:
            reading = self._reading(plan, planner)
            beside = [torch.empty(one.target.shape, dtype=one.target.dtype) for one in reading.reads]
            reading.fill(beside)
        except Exception as error:  # whatever it is, the others must hear of it
            problem = error
        failed = self._failed(None if problem is None else str(problem), ranks)
        if problem is not None:
            raise problem
        if failed:
            raise LoadError(f"Nothing was loaded, as another rank could not read its part: {failed[0]}")
        reading.move(beside)
        reading.commit()

    def _failed(self, problem: str | None, ranks: int) -> list[str]:
        """Return what went wrong on any rank."""
        if ranks == 1:
            return [problem] if problem else []
        found: list[str | None] = [None] * ranks
        dist.all_gather_object(found, problem, group=self.process_group)
        return [one for one in found if one]

    def _reading(self, plan: LoadPlan, planner: LoadPlanner) -> Reading:
        """Check everything that will be read, and touch nothing yet."""
        contents = self._contents()
        cast_ = self.cast or bool(getattr(planner, "cast", False))
        tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        places = {item.storage_index: self._place(item, contents) for item in plan.items}
        contents.check_files((_key(item), places[item.storage_index]) for item in plan.items)
        reads = [self._read(item, places[item.storage_index], contents, planner, cast_) for item in tensors]
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        checked = type(planner).load_bytes in _UNPICKLING
        admitted = (*self._admitted, *getattr(planner, "admitted", ())) if checked else None
        entries = [_entry(item, places[item.storage_index], contents, admitted) for item in values]
        reading = Reading(contents, reads, entries, planner, self.threads)
        reading.locate()
        if self.verify:
            reading.verify()
        return reading

    def _contents(self) -> Contents:
        metadata = self._metadata
        if metadata is None or metadata.storage_data is None:
            raise LoadError(f"{self.path / METADATA} does not tell where anything is stored; use another checkpoint.")
        record = record_of(metadata, str(self.path / METADATA))
        return Contents(Base(locate(self.path), save_id_of(metadata) or "", metadata, record))

    def _place(self, item: ReadItem, contents: Contents) -> _StorageInfo:
        info = contents.base.metadata.storage_data.get(item.storage_index)
        if isinstance(info, _StorageInfo):
            return info
        raise LoadError(
            f"{self.path} does not tell in which file {contents.described(_key(item))} is; use another checkpoint."
        )

    def _read(self, item: ReadItem, info: _StorageInfo, contents: Contents, planner: LoadPlanner, cast_: bool) -> Read:
        """Return what is to be read for one item, checked against the tensor that it goes into."""
        key = _key(item)
        stored = contents.base.metadata.state_dict_metadata.get(item.storage_index.fqn)
        target = planner.resolve_tensor(item).detach()
        if tuple(target.shape) != tuple(item.lengths):
            raise LoadError(
                f"{contents.described(key)} in {self.path} gives a part of shape {tuple(item.lengths)}, where one of "
                f"{tuple(target.shape)} is to be filled; build the model as it was saved."
            )
        if any(size > 1 and not stride for size, stride in zip(target.shape, target.stride(), strict=True)):
            raise LoadError(
                f"{contents.described(key)} in {self.path} cannot be loaded into an expanded tensor, whose elements "
                f"share memory; put a tensor of its own into the state dict."
            )
        if not isinstance(stored, TensorStorageMetadata):  # another step's, which its planner has checked
            return Read(item, info, target, None, None)
        dtype = stored.properties.dtype
        narrowed = contents.base.source_shape(key).dtype
        if not cast_ and target.dtype not in (dtype, narrowed):
            raise LoadError(
                f"{contents.described(key)} in {self.path} is stored as {dtype}, but is {target.dtype} in the state "
                f"dict; pass cast=True to convert it."
            )
        return Read(item, info, target, chunk_shape(item.storage_index, stored), dtype)


def _cores() -> int:
    """Return how many cores this process may use, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_ranks(plan: LoadPlan, ranks: int) -> LoadPlan:
    plan.storage_data = ranks
    return plan


def _key(item: ReadItem) -> str:
    """Return the key that an item is stored under; what comes from another step has that step before it."""
    return item.storage_index.fqn.rpartition("\0")[2]


def _entry(item: ReadItem, info: _StorageInfo, contents: Contents, admitted: Sequence[Admitted] | None) -> Entry:
    """Read an entry that is no tensor, and leave it pickled.

    Where the planner unpickles it, it gets a pickle that was made here of what is safe in it: a stock planner's
    unpickler takes far more memory, and other devices, for one that somebody else has made, when tensors are filled.
    """
    key, stored = _key(item), Checkpoint(contents).stored(_key(item), info)
    if admitted is None:
        return Entry(item, info, stored, stored)
    return Entry(item, info, stored, io.BytesIO(pickled_anew(stored, key, str(contents.file(info)), admitted)))
