"""What materializing costs beside ``cp -r`` of the live bytes.

    PYTHONPATH=. python benchmarks/materialize.py [--pairs 15] [--json FILE]

A composite over ten steps is made into a self-contained checkpoint, whose bytes ``cp -r`` then copies. In memory
neither waits for a disk. On a disk ``cp`` leaves its bytes in the page cache, where a crash of the machine loses them,
while materializing puts them on the disk; so there ``cp -r`` is followed by ``sync`` of what it wrote. All is read from
the page cache. Each number is a ratio of interleaved pairs in one run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import warnings
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed.checkpoint as dcp
import typer

from benchmarks.harness import (
    Work,
    disk_bytes,
    interleave,
    llama_shapes,
    ratio,
    scratch,
    training_state,
)
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, LayerwiseWriter, materialize

SHAPES = llama_shapes(layers=8, hidden=768, vocab=8192)  # 88 M parameters: 1.06 GB with Adam's moments
STEPS = 10
BAR = 0.8
_IN = {"memory": "in memory", "disk": "on a disk"}


def main(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 15,
    memory: Annotated[Path, typer.Option(help="A folder in memory.")] = Path("/dev/shm"),
    disk: Annotated[Path, typer.Option(help="A folder on a disk.")] = Path("/tmp"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure all rows; exit with 1 if a bar is missed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[Row] = []
    size = 0
    for name, place in (("memory", memory), ("disk", disk)):
        with scratch(str(place)) as folder:
            found, size = _measured(folder, pairs, name)
        rows += found
    publish(f"materializing {size / 1e9:.2f} GB, {pairs} pairs", rows, out, bytes=size)


def _measured(folder: Path, pairs: int, where: str) -> tuple[list[Row], int]:
    """Return the rows, and the bytes that are copied."""
    synced = where == "disk"
    state = training_state(SHAPES)
    for step in range(1, STEPS + 1):
        writer = LayerwiseWriter(folder / "run" / f"step-{step}")
        dcp.save(state, storage_writer=writer, planner=LayerwisePlanner(f"parity:groups={STEPS}"))
    last, live, new = folder / "run" / f"step-{STEPS}", folder / "live", folder / "new"
    materialize(last, live)
    stock, files = folder / "stock", [str(new / path.name) for path in live.iterdir()]
    dcp.save(state, checkpoint_id=stock)

    def copy() -> None:
        subprocess.run(["cp", "-r", str(live), str(new)], check=True)
        if synced:
            subprocess.run(["sync", *files], check=True)

    def reset() -> None:
        shutil.rmtree(new)
        if synced:
            os.sync()  # what one has left to the disk must not be paid by the next

    works: dict[str, Work] = {
        "cp": copy,
        "verified": lambda: _made(last, new, True),
        "not verified": lambda: _made(last, new, False),
        "verified, of a stock save": lambda: _made(stock, new, True),
    }
    times = interleave(works, pairs, reset)
    beside = "cp -r, then sync" if synced else "cp -r"
    size = disk_bytes(live)

    def told(what: str) -> Row:
        seconds = statistics.median(times[what])
        found = ratio(times["cp"], times[what])
        return row(
            f"{what}, {_IN[where]}", beside, "rate", found, BAR, at_least=True, note=f"{size / seconds / 1e9:.1f} GB/s"
        )

    return [told(what) for what in works if what != "cp"], size


def _made(source: Path, out: Path, verify: bool) -> None:
    made = materialize(source, out, verify=verify)
    assert made.checked == (made.blobs if verify else 0)


if __name__ == "__main__":
    typer.run(main)
