"""A training with DeepSpeed ZeRO-3 as there are many: it knows nothing of tailor_dcp.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 zero_run.py my-run --steps 12 --save 8 --save 12
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 zero_run.py my-run --steps 16 --resume my-run/merged

It saves with DeepSpeed's own ``save_checkpoint``, each step into a folder ``checkpoint-<step>``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import deepspeed
import torch.distributed as dist
import typer
from torch.optim import AdamW

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import batch, tiny_llama

TEXTS = 4  # that all ranks together see in a step


def train(
    run: Path,
    steps: int = 12,
    save: Annotated[list[int] | None, typer.Option(help="Steps to save at.")] = None,
    resume: Annotated[Path | None, typer.Option(help="The checkpoint to go on from.")] = None,
) -> None:
    """Train, and print a line for each step."""
    deepspeed.init_distributed("gloo", verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = tiny_llama(width=64)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=AdamW(model.parameters(), lr=5e-3),
        config={
            "train_batch_size": TEXTS,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,  # DeepSpeed has not tested torch's own
        },
    )
    if resume and engine.load_checkpoint(str(resume))[0] is None:
        raise SystemExit(f"{resume} was not loaded")
    for step in range(engine.global_steps + 1, steps + 1):
        texts = batch(step, size=TEXTS)[rank::ranks]
        loss = engine(input_ids=texts, labels=texts).loss
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
        if rank == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
        if step in (save or ()):
            engine.save_checkpoint(str(run / f"checkpoint-{step}"))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.modules["tailor_dcp"] = None  # type: ignore[assignment]  # importing it is an error here
    typer.run(train)
