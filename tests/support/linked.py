"""What workers do with linked checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tailor_dcp import LayerwisePlanner, LayerwiseReader, open_checkpoint
from tailor_dcp.converters import Options, convert, torch_file

LINK = Options(link=True)


def blank(folder: Path) -> dict[str, torch.Tensor]:
    """Return tensors to load a checkpoint into, none of whose elements is what it holds."""
    checkpoint = open_checkpoint(folder)
    keys = [key for key in checkpoint if key.startswith(("model.", "optim.state."))]
    return {key: torch.full(checkpoint.shape(key), 77, dtype=checkpoint.dtype(key)) for key in keys}


def load_sharded(group: Any, folder: str) -> dict[str, torch.Tensor]:
    """Load every tensor that has a dimension, cut along the first or the last, and put it together."""
    mesh = DeviceMesh.from_group(group, "cpu")
    target = {}
    for number, (key, value) in enumerate(blank(Path(folder)).items()):
        if value.dim():
            shard = Shard(0 if number % 2 else value.dim() - 1)
            target[key] = distribute_tensor(value, mesh, [shard])
    dcp.load(target, storage_reader=LayerwiseReader(folder, process_group=group), process_group=group)
    return {key: value.full_tensor() for key, value in target.items() if isinstance(value, DTensor)}


def convert_linked(group: Any, source: str, target: str) -> int:
    """Convert with all workers."""
    torch_file._SMALL = 0
    return convert(source, target, "dcp", options=LINK).linked


def resume(group: Any, setup: dict[str, Any], folder: str) -> dict[str, Any]:
    """Load a linked checkpoint into an engine of other weights, go on, and save by a policy."""
    from tailor_dcp import EngineState
    from tests.support import zero_engines

    told = zero_engines.Setup(**setup)
    engine = zero_engines._engine(told, seed=2)
    dcp.load(EngineState(engine), storage_reader=LayerwiseReader(folder), checkpoint_id=folder)
    saved = zero_engines.state_of(engine)
    losses = zero_engines._train(engine, told, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target = Path(folder).with_name("step-4")
        dcp.save(EngineState(engine), checkpoint_id=target, planner=LayerwisePlanner("parity"))
    return {"saved": saved, "losses": losses, "warned": [str(w.message) for w in caught]}
