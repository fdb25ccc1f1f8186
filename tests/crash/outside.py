"""What a process that knows only stock torch finds in checkpoints. Nothing here may import tailor_dcp."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Holdings = dict[str, Any]
"""By key what a checkpoint holds: dtype, shape and bytes of tensors, the text of everything else."""
UNREADABLE = ""
"""The one key of what cannot be loaded; it says why."""


def holdings(group: Any, folders: list[str]) -> list[Holdings]:
    """Load checkpoints whole; of one that cannot be loaded return why."""
    found: list[Holdings] = []
    for folder in folders:
        try:
            found.append(_load(folder))
        except BaseException as error:  # CheckpointException is no Exception
            found.append({UNREADABLE: str(error).strip().rpartition("\n")[2]})
    return found


def _load(folder: str) -> Holdings:
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    target: dict[str, Any] = {
        key: torch.full(tuple(entry.size), 77, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in entries.items()
    }
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    return {key: plain(value) for key, value in target.items()}


def plain(value: Any) -> Any:
    """Return what can be compared with ``==``, and sent."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(value.dtype), tuple(value.shape), raw
