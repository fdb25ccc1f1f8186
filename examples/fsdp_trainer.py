"""A training script with FSDP2 that may be killed at any time and goes on where it was.

    torchrun --nproc-per-node 2 examples/fsdp_trainer.py my-run

Type the same command again to resume. Three things differ from a script that writes full
checkpoints: `TrainState`, `latest`, and the planner that `dcp.save` is given.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from tiny_llama import batch, tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

from tailor_dcp import LayerwisePlanner, TrainState, latest


def sharded_model() -> LlamaForCausalLM:
    """Return the model, sharded over all ranks block by block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = tiny_llama()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(
    run: Annotated[Path, typer.Argument(help="The folder of this run's checkpoints.")],
    steps: int = 160,
    every: Annotated[int, typer.Option(help="Steps from one checkpoint to the next.")] = 8,
    policy: Annotated[str, typer.Option(help="What each checkpoint writes.")] = "moments:every=5,weights=bf16",
) -> None:
    """Train, from the newest checkpoint on if there is one. Prints JSON lines."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = sharded_model()
    optimizer = AdamW(model.parameters(), lr=2e-3)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    progress = {"step": 0}
    state = TrainState(model, optimizer, scheduler, extra=progress)

    newest = latest(run)
    if newest:
        dcp.load(state, checkpoint_id=newest)
    say(rank=rank, pid=os.getpid(), resumed_from=progress["step"])

    for step in range(progress["step"] + 1, steps + 1):
        texts = batch(step, rank)
        loss = model(input_ids=texts, labels=texts).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
        if rank == 0:
            say(step=step, loss=loss.item())
        if step % every == 0:
            progress["step"] = step
            dcp.save(state, checkpoint_id=run / f"step-{step}", planner=LayerwisePlanner(policy))
    dist.destroy_process_group()


def say(**values: float) -> None:
    """Print a line of JSON in one piece: the ranks share this output."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(train)
