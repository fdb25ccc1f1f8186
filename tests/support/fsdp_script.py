"""A training with FSDP2 whose script knows only torch's documented calls. It must run without this package."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from tests.support.zero import batch_loss, make_model, param_groups


def losses(group: Any, name: str, steps: list[int], source: str, target: str | None, save_at: int = 0) -> list[float]:
    """Load, train the given steps, and save before the one numbered ``save_at``; return the losses.

    Args:
        group: the workers.
        name: the model.
        steps: the numbers of the batches.
        source: the checkpoint.
        target: where to save; None for nowhere.
        save_at: before which of the steps to save.
    """
    mesh = DeviceMesh.from_group(group, "cpu")
    model: Any = make_model(name, 5)
    layers = model.model.layers if hasattr(model, "model") else model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(param_groups(model, 1))
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": moments}
    dcp.load(state, checkpoint_id=source, process_group=group)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    found = []
    for step in steps:
        if target is not None and step == save_at:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": moments}, checkpoint_id=target, process_group=group)
        loss = batch_loss(name, model, step, dist.get_rank(group))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
