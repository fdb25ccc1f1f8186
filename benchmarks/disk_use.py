"""How much disk a run holds when only its last checkpoints are kept, beside full saves by stock DCP.

    PYTHONPATH=. python benchmarks/disk_use.py [--saves 20] [--json FILE]

Old folders are simply removed, as torchtitan's keep-latest-k and the Trainer's
save_total_limit do. A file that several folders link counts once. Bytes, not times: the
numbers are the same on every machine.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch.distributed.checkpoint as dcp
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import disk_bytes, llama_shapes, machine, scratch, training_state
from tailor_dcp import LayerwisePlanner, LayerwiseWriter, forget, inspect

SHAPES = llama_shapes(layers=10, hidden=128, vocab=2048)
POLICIES = ("parity", "filter:head=1,tail=1,every=5", "moments:every=5", "moments:every=5,weights=bf16,moments=bf16")
KEEP = (1, 2, 10)
WRITERS = {"FileSystemWriter": dcp.FileSystemWriter, "LayerwiseWriter": LayerwiseWriter}


def main(
    saves: Annotated[int, typer.Option(help="Saves in the run.")] = 20,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Save a run with each policy and writer and weigh what is left."""
    warnings.simplefilter("ignore")
    state = training_state(SHAPES)
    rows = []
    with scratch(".") as folder:
        full = _full_save(state, folder / "full")
        for policy in POLICIES:
            for name, writer in WRITERS.items():
                rows.append({"policy": policy, "writer": name, **_weigh(state, folder, policy, writer, saves, full)})
    table = Table(title=f"Disk in use after {saves} saves, beside keeping as many full saves", title_justify="left")
    columns = ["policy", "writer", "written", *(f"keep {n}" for n in KEEP), "last on disk / live"]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console(width=130).print(table)
    if out:
        out.write_text(json.dumps({"machine": machine(), "saves": saves, "rows": rows}, indent=2) + "\n")


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
