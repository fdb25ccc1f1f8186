"""How long training stands still for an asynchronous save: our stager beside stock staging.

    python -m benchmarks.async [--pairs 20] [--place /dev/shm] [--json FILE]

The stall is the time until ``dcp.async_save`` returns, with its thread executor, in one process.
Both stagers copy to fresh memory on the CPU; ours copies only what is due. So its stall should be
the due fraction of the stock one, plus what deciding costs: the stall of a policy that finds
nothing due.
"""

# ruff: noqa: N999 - a script; nobody imports it
from __future__ import annotations

import shutil
import statistics
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.harness import (
    Work,
    interleave,
    llama_shapes,
    ratio,
    scratch,
    tensor_bytes,
    training_state,
)
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, forget, inspect
from tailor_dcp.policies import SaveRequest
from tailor_dcp.units import Unit

SHAPES = llama_shapes(layers=10, hidden=512, vocab=16384)  # 59 M parameters: 0.7 GB with Adam's moments
NOTHING = "nothing due"
POLICIES = ("full", "moments:every=2", "parity", "moments:every=5", "parity:groups=5")
SLACK = 1.15  # a stall may lie so far above what its bytes account for


def main(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 20,
    place: Annotated[Path, typer.Option(help="Where to save.")] = Path("/dev/shm"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure the stall of each policy; exit with 1 if one is more than proportional to the bytes due."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with scratch(str(place)) as folder:
        saves = Saves(folder)
        times = interleave(saves.works(), pairs, saves.finish)
        fractions = {name: saves.fraction(name) for name in (*POLICIES, NOTHING)}
    dist.destroy_process_group()
    again = row("stock again", "stock", "stall", ratio(times["stock again"], times["stock"]))
    rows = [again, *(_row(name, times, fractions) for name in fractions)]
    publish(f"Stall of an asynchronous save, {tensor_bytes(SHAPES) / 1e9:.2f} GB, {pairs} pairs", rows, out)


class Saves:
    """Starts asynchronous saves of one state upon one base, and finishes them outside of the measured time."""

    def __init__(self, folder: Path) -> None:
        self._state = training_state(SHAPES)
        self._base, self._target = folder / "step-1", folder / "step-2"
        self._group = dist.new_group()  # the background's own: the harness has barriers in the default one
        self._pending: Any = None
        dcp.save(self._state, checkpoint_id=self._base, planner=LayerwisePlanner("full", base=None))

    def works(self) -> dict[str, Work]:
        """Return what is timed, by name."""
        works: dict[str, Work] = {"stock": self._stock, "stock again": self._stock}
        return works | {name: self._ours(name) for name in (NOTHING, *POLICIES)}

    def finish(self) -> None:
        """Wait for the save in the background and remove what it wrote."""
        self._wait()
        shutil.rmtree(self._target, ignore_errors=True)

    def fraction(self, name: str) -> float:
        """Save once more and return how much of the state was written."""
        self._ours(name)()
        self._wait()
        found = inspect(self._target)
        self.finish()
        return found.written / found.live

    def _wait(self) -> None:
        if self._pending is not None:
            getattr(self._pending, "upload_completion", self._pending).result()
        self._pending = None

    def _stock(self) -> None:
        self._start(None, DefaultStager(StagingOptions(False, False, False, False)))

    def _ours(self, name: str) -> Work:
        def save() -> None:
            forget()
            planner = LayerwisePlanner(nothing if name == NOTHING else name, base=self._base)
            self._start(planner, planner.stager(self._target, self._group))

        return save

    def _start(self, planner: LayerwisePlanner | None, stager: Any) -> None:
        self._pending = dcp.async_save(
            self._state,
            storage_writer=dcp.FileSystemWriter(self._target),
            planner=planner,
            process_group=self._group,
            async_stager=stager,
        )


def nothing(request: SaveRequest) -> list[Unit]:
    """Find nothing due."""
    return []


def _row(name: str, times: dict[str, list[float]], fractions: dict[str, float]) -> Row:
    found = ratio(times[name], times["stock"])
    expected = ratio(times[NOTHING], times["stock"]).median + fractions[name]
    note = f"{fractions[name]:.3f} of the bytes; {1000 * statistics.median(times[name]):.0f} ms"
    return row(name, "stock", "stall", found, SLACK * expected, note=note)


if __name__ == "__main__":
    typer.run(main)
