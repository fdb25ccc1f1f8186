"""A training script with FSDP2 that goes on from any checkpoint in the layout of ``get_state_dict``.

It knows torch alone, neither DeepSpeed nor tailor_dcp, and no word of it is about ZeRO.

    torchrun --nproc-per-node 4 examples/fsdp_from_zero.py my-run/step-8 --first 9
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from tiny_llama import batch, tiny_llama
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

TEXTS = 4  # that all ranks together see in a step


def train(
    checkpoint: Annotated[Path, typer.Argument(help="Where to go on from.")],
    first: Annotated[int, typer.Option(help="The first step to train.")],
    steps: Annotated[int, typer.Option(help="The last one.")] = 16,
) -> None:
    """Load, train on, and print JSON lines."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    model = tiny_llama()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamW(model.parameters(), lr=2e-3)

    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optim": moments}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    say(rank=rank, pid=os.getpid(), resumed_from=first - 1)

    for step in range(first, steps + 1):
        texts = batch(step, size=TEXTS)[rank::ranks]
        loss = model(input_ids=texts, labels=texts).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
        if rank == 0:
            say(step=step, loss=loss.item())
    dist.destroy_process_group()


def say(**values: float) -> None:
    """Print a line of JSON in one piece: the ranks share this output."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    # Importing either is an error in this process from here on.
    sys.modules["tailor_dcp"] = sys.modules["deepspeed"] = None  # type: ignore[assignment]
    typer.run(train)
