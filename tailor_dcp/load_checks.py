"""Checks of a load, all made before the first byte of the caller's tensors is overwritten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list

from tailor_dcp.base import dtype_named
from tailor_dcp.contents import Contents
from tailor_dcp.errors import LoadError
from tailor_dcp.load_sources import Source


def check_form(key: str, value: Any, source: Source, cast: bool) -> None:
    """Check that an entry fits the value it is loaded into.

    Args:
        key: the key in the caller's state dict.
        value: what is there now.
        source: the entry that fills it.
        cast: dtypes may differ.

    Raises:
        LoadError: one is a tensor and the other is not, or sizes or dtypes differ.
    """
    stored, dtype = source.stored, getattr(value, "dtype", None)
    where = f"{source.contents.described(source.key)} in {source.contents.folder}"
    if not isinstance(stored, TensorStorageMetadata):
        if isinstance(value, torch.Tensor):
            raise LoadError(f"{where} is an object, but {key} is a tensor in the state dict; put any object there.")
        return
    if not isinstance(dtype, torch.dtype):
        raise LoadError(
            f"{where} is a tensor, but {key} is a {type(value).__name__} in the state dict; put a tensor of size "
            f"{tuple(stored.size)} there."
        )
    if tuple(value.size()) != tuple(stored.size):
        raise LoadError(
            f"{where} has the size {tuple(stored.size)}, but {key} has {tuple(value.size())} in the state dict; build "
            f"the model as it was saved, or leave that layer out with layers=."
        )
    if not (cast or _dtype_fits(dtype, stored.properties.dtype, source)):
        raise LoadError(
            f"{where} is stored as {stored.properties.dtype}, but {key} is {dtype} in the state dict; "
            f"pass cast=True to convert it."
        )


def _dtype_fits(wanted: torch.dtype, stored: torch.dtype, source: Source) -> bool:
    """A dtype that the save itself narrowed comes back as the training state had it."""
    record = source.contents.base.record
    before = record.narrowed.get(source.key) if record else None
    return wanted == stored or (before is not None and wanted == dtype_named(before))


def check_whole(key: str, value: Any, source: Source, items: Sequence[ReadItem]) -> None:
    """Check that what will be read fills all of a tensor's elements on this rank.

    Raises:
        LoadError: some elements are stored nowhere.
    """
    if not isinstance(source.stored, TensorStorageMetadata):
        return
    wanted = sum(math.prod(chunk.sizes) for chunk in _create_chunk_list(value))
    read = sum(math.prod(item.lengths) for item in items)
    if read < wanted:
        raise LoadError(
            f"{source.contents.folder} holds only {read} of the {wanted} elements of "
            f"{source.contents.described(source.key)} that {key} needs; load that layer from another step with steps=."
        )


def check_places(reads: Mapping[str, tuple[Source, Sequence[ReadItem]]]) -> dict[MetadataIndex, _StorageInfo]:
    """Check that every blob has a place, and every file is there and long enough.

    Args:
        reads: for each key its source and what is read of it, with the index that the reader will use.

    Returns:
        The place of each blob by its index in the checkpoint that is being loaded, relative to its source.

    Raises:
        LoadError: naming the file, the layer and the step.
    """
    by_checkpoint: dict[int, tuple[Contents, list[tuple[str, _StorageInfo]]]] = {}
    found: dict[MetadataIndex, _StorageInfo] = {}
    for source, items in reads.values():
        _, blobs = by_checkpoint.setdefault(id(source.contents), (source.contents, []))
        for item in items:
            info = _place(source, item)
            blobs.append((source.key, info))
            found[item.storage_index] = info
    for contents, blobs in by_checkpoint.values():
        contents.check_files(blobs)
    return found


def _place(source: Source, item: ReadItem) -> _StorageInfo:
    info = (source.contents.base.metadata.storage_data or {}).get(replace(item.storage_index, fqn=source.key))
    if isinstance(info, _StorageInfo):
        return info
    described = source.contents.described(source.key)
    if info is None:
        raise LoadError(
            f"{source.contents.folder} does not tell where {described} is stored, as after a save that failed "
            f"unnoticed; load that layer from another step with steps=."
        )
    raise LoadError(
        f"{source.contents.folder} is not stored in DCP's own files, which LayerwiseLoadPlanner needs to find "
        f"{described}; load it with the planner of its reader."
    )
