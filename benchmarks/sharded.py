"""Checkpoints of any shapes and any number of ranks, made without training: sparse files, or files of random bytes.

The metadata is what our planner and DCP's own writer give for such a run; the files have the right names and lengths.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from tailor_dcp import LayerwisePlanner
from tailor_dcp.coordination import RankInfo, shapes_of

Shapes = Mapping[str, tuple[int, ...]]

_STATES = ("step", "exp_avg", "exp_avg_sq")
_HEADER = 1536  # bytes that torch.save puts around a tensor
_VALUE = 1024  # bytes of an entry that is no tensor
_BLOCK = 1 << 24


def write_checkpoint(folder: Path, shapes: Shapes, ranks: int, sparse: bool = True) -> int:
    """Write what ``ranks`` ranks of FSDP2 save with AdamW in fp32: each its rows of every tensor.

    Args:
        folder: the checkpoint's folder, ``run/step-100``.
        shapes: the parameters.
        ranks: how many ranks.
        sparse: files without content, which take no room.

    Returns:
        The bytes of the files.
    """
    planner = LayerwisePlanner("full", base=None)
    planner.set_up_planner({}, StorageMeta(str(folder)), is_coordinator=True)
    plans, metadata = planner.create_global_plan([_plan(rank, ranks, shapes) for rank in range(ranks)])
    folder.mkdir(parents=True)
    storage, total = {}, 0
    for plan in plans:
        name, end = f"{plan.storage_data.prefix}0.distcp", 0
        for item in plan.items:
            length = _length(item)
            storage[item.index] = _StorageInfo(name, end, length)
            end += length
        _write_file(folder / name, end, sparse)
        total += end
    metadata.storage_data = storage
    metadata.storage_meta = StorageMeta(str(folder), "0" * 32)
    metadata.version = "1.0.0"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return total


def _plan(rank: int, ranks: int, shapes: Shapes) -> SavePlan:
    paths: dict[str, tuple[str | int, ...]] = {"train.step": ("train", "step")}
    # The coordinator writes what is not a tensor, and 0-d tensors.
    items = [WriteItem(MetadataIndex("train.step"), WriteItemType.BYTE_IO)] if rank == 0 else []
    groups = {"lr": 1e-3, "params": list(shapes)}
    for name in groups:
        paths[f"optim.param_groups.0.{name}"] = ("optim", "param_groups", 0, name)
        if rank == 0:
            items.append(WriteItem(MetadataIndex(f"optim.param_groups.0.{name}"), WriteItemType.BYTE_IO))
    for fqn, shape in shapes.items():
        for kind in ("weight", *_STATES):
            path = ("model", fqn) if kind == "weight" else ("optim", "state", fqn, kind)
            key = ".".join(path)
            paths[key] = path
            if kind != "step":
                items += _shard(key, shape, rank, ranks)
            elif rank == 0:
                items.append(_item(key, (), (), ()))
    plan = SavePlan(items, planner_data=paths)
    return replace(plan, planner_data=RankInfo(paths, shapes_of(plan), ()))


def _shard(key: str, shape: tuple[int, ...], rank: int, ranks: int) -> list[WriteItem]:
    rows = -(-shape[0] // ranks)
    mine = min(rows, shape[0] - rank * rows)
    if mine <= 0:
        return []
    return [_item(key, shape, (rank * rows, *[0] * (len(shape) - 1)), (mine, *shape[1:]))]


def _item(key: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(shape))
    return WriteItem(
        MetadataIndex(key, chunk.offsets), WriteItemType.SHARD if shape else WriteItemType.TENSOR, tensor_data=data
    )


def _length(item: WriteItem) -> int:
    return _VALUE if item.tensor_data is None else item.tensor_data.chunk.sizes.numel() * 4 + _HEADER


def _write_file(path: Path, size: int, sparse: bool) -> None:
    with path.open("wb") as stream:
        if sparse:
            stream.truncate(size)
            return
        while (left := size - stream.tell()) > 0:
            stream.write(os.urandom(min(_BLOCK, left)))
