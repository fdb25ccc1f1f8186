"""How much disk a run holds when only its last checkpoints are kept, beside full saves by stock DCP.

    python -m benchmarks.disk_use [--saves 20] [--json FILE]

Old folders are simply removed, as torchtitan's keep-latest-k and the Trainer's
save_total_limit do. A file that several folders link counts once. Bytes, not times: the
numbers are the same on every machine.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch.distributed.checkpoint as dcp
import typer

from benchmarks.harness import disk_bytes, llama_shapes, scratch, training_state
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, LayerwiseWriter, forget, inspect

SHAPES = llama_shapes(layers=10, hidden=128, vocab=2048)
POLICIES = ("parity", "filter:head=1,tail=1,every=5", "moments:every=5", "moments:every=5,weights=bf16,moments=bf16")
KEEP = (1, 2, 10)
LIVE = 1.15
"""Times its live bytes that a checkpoint may take when only the last is kept."""
WRITERS = {"FileSystemWriter": dcp.FileSystemWriter, "LayerwiseWriter": LayerwiseWriter}


def main(
    saves: Annotated[int, typer.Option(help="Saves in the run.")] = 20,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Save a run with each policy and writer and weigh what is left."""
    warnings.simplefilter("ignore")
    state = training_state(SHAPES)
    rows: list[Row] = []
    with scratch(".") as folder:
        full = _full_save(state, folder / "full")
        for policy in POLICIES:
            for name, writer in WRITERS.items():
                rows += _rows(f"{policy}, {name}", _weigh(state, folder, policy, writer, saves, full))
    publish(f"Disk in use after {saves} saves", rows, out, saves=saves)


def _rows(name: str, found: dict[str, float]) -> list[Row]:
    rows = [row(f"{name}, keep {keep}", f"{keep} full saves", "bytes on disk", found[f"keep {keep}"]) for keep in KEEP]
    excess, written = found["last on disk / live"], found["written"]
    # A carried file that is partly dead stays as a whole; only our writer promises not to make such files.
    bar = LIVE if name.endswith("LayerwiseWriter") else None
    last = row(f"{name}, the last checkpoint", "its live bytes", "bytes on disk", excess, bar)
    return [*rows, row(f"{name}, all saves", "full saves", "bytes written", written), last]


def _full_save(state: dict[str, Any], folder: Path) -> int:
    dcp.save(state, checkpoint_id=folder)
    size = disk_bytes(folder)
    shutil.rmtree(folder)
    return size


def _weigh(
    state: dict[str, Any], folder: Path, policy: str, writer: type[Any], saves: int, full: int
) -> dict[str, float]:
    """Return the disk in use at the end, as a multiple of the same number of full saves."""
    found: dict[str, float] = {}
    for keep in KEEP:
        run = folder / "run"
        written = [inspect(path).written for path in _run(state, run, policy, writer, saves, keep)]
        found[f"keep {keep}"] = disk_bytes(run) / (full * keep)
        found["written"] = sum(written) / (full * saves)
        last = run / f"step-{saves}"
        if keep == 1:
            found["last on disk / live"] = disk_bytes(last) / inspect(last).live
        shutil.rmtree(run)
    return found


def _run(state: dict[str, Any], run: Path, policy: str, writer: type[Any], saves: int, keep: int) -> Iterator[Path]:
    forget()
    for step in range(1, saves + 1):
        path = run / f"step-{step}"
        dcp.save(state, storage_writer=writer(path), planner=LayerwisePlanner(policy))
        yield path
        shutil.rmtree(run / f"step-{step - keep}", ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
