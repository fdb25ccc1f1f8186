"""A run that saves asynchronously, for torchrun: ``async_run.py RUN thread|process plain|staged``.

Saves steps 10 to 50 by parity. The save of step 30 fails in the background and that of step
40 is still being written when step 50 is planned, so neither may be carried from.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from tailor_dcp import LayerwisePlanner
from tests.support.world import Model, Param, state

MODEL = Model(
    (
        Param("model.embed_tokens.weight", (6, 2), "shard"),
        *(Param(f"model.layers.{i}.mlp.weight", (4, 3), "shard") for i in range(4)),
        Param("lm_head.weight", (6, 2)),
    )
)


_NO_OPTIONS = StagingOptions(False, False, False, False)  # what async_save itself takes where none is given


class Troubled(dcp.FileSystemWriter):
    """A writer that fails, or waits until a file appears, before it writes."""

    def __init__(self, path: str, trouble: str) -> None:
        super().__init__(path)
        self.trouble = trouble

    def write_data(self, plan: Any, planner: Any) -> Any:
        if self.trouble == "fail":
            raise OSError("no space left, or so it is said")
        while self.trouble and not Path(self.trouble).exists():
            time.sleep(0.01)
        return super().write_data(plan, planner)


def main(run: str, executor: str, staging: str) -> None:
    """Save, in order: well, well, badly, slowly, well."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    gate = f"{run}/go"
    slow = None
    for step, trouble in ((10, ""), (20, ""), (30, "fail"), (40, gate), (50, "")):
        # Saves that overlap need groups of their own, or their collectives would be mixed up.
        group = dist.new_group() if executor == "thread" else None
        future = save(f"{run}/step-{step}", step, (executor, staging, trouble), group)
        if trouble == gate:
            slow = future
            if executor == "process":  # its daemon saves one after the other: nothing can overtake
                Path(gate).touch()
                future.result()
        elif trouble == "fail":
            try:
                future.result()
            except BaseException as error:  # CheckpointException is no Exception
                assert "no space left" in str(error), error
            else:
                raise AssertionError("the save that had to fail did not")
        else:
            future.result()
    dist.barrier()
    assert not Path(f"{run}/step-30/.metadata").exists()
    if executor == "thread":
        assert not Path(f"{run}/step-40/.metadata").exists(), "the slow save was to be in flight"
        Path(gate).touch()
        assert slow is not None
        slow.result()
    dist.destroy_process_group()


def save(path: str, step: int, how: tuple[str, str, str], group: dist.ProcessGroup | None) -> Any:
    """Start one save and return its future."""
    executor, staging, trouble = how
    planner = LayerwisePlanner("parity")
    response = dcp.async_save(
        state(MODEL, step, dist.group.WORLD),
        storage_writer=Troubled(path, trouble),
        planner=planner,
        process_group=group,
        async_checkpointer_type=AsyncCheckpointerType(executor),
        async_stager=planner.stager(path, group) if staging == "staged" else DefaultStager(_NO_OPTIONS),
    )
    return getattr(response, "upload_completion", response)


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # a thread of gloo's sometimes aborts a process that ends in the ordinary way
