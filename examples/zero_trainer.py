"""A training script with DeepSpeed's ZeRO that may be killed at any time and goes on where it was.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/zero_trainer.py my-run

Type the same command again to resume, with as many ranks and whichever stage you like. Three
things differ from a script that calls ``engine.save_checkpoint``: `EngineState`, `latest`, and
DCP's own `load` and `save`, the latter with a planner.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import deepspeed
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from tiny_llama import batch, tiny_llama
from torch.optim import AdamW

from tailor_dcp import EngineState, LayerwisePlanner, latest

TEXTS = 4  # that all ranks together see in a step


def train(
    run: Annotated[Path, typer.Argument(help="The folder of this run's checkpoints.")],
    steps: int = 20,
    every: Annotated[int, typer.Option(help="Steps from one checkpoint to the next.")] = 4,
    policy: Annotated[str, typer.Option(help="What each checkpoint writes.")] = "moments:every=3",
    stage: Annotated[int, typer.Option(help="Of ZeRO: 1, 2 or 3.")] = 3,
) -> None:
    """Train, from the newest checkpoint on if there is one. Prints JSON lines."""
    deepspeed.init_distributed("gloo", verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = tiny_llama()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=AdamW(model.parameters(), lr=2e-3),
        config={
            "train_batch_size": TEXTS,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,  # DeepSpeed has not tested torch's own
            "gradient_clipping": 1.0,
        },
    )
    state = EngineState(engine)

    newest = latest(run)
    if newest:
        dcp.load(state, checkpoint_id=newest)
    say(rank=rank, pid=os.getpid(), resumed_from=engine.global_steps)

    for step in range(engine.global_steps + 1, steps + 1):
        texts = batch(step, size=TEXTS)[rank::ranks]
        loss = engine(input_ids=texts, labels=texts).loss
        engine.backward(loss)
        engine.step()

        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
        if rank == 0:
            say(step=step, loss=loss.item())
        if step % every == 0:
            dcp.save(state, checkpoint_id=run / f"step-{step}", planner=LayerwisePlanner(policy))
    dist.destroy_process_group()


def say(**values: float) -> None:
    """Print a line of JSON in one piece: the ranks share this output."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    typer.run(train)
