"""Large metadata: planning, dumping, reading, inspecting and merging beside DCP's own, on simulated ranks.

    python -m benchmarks.scale [--quick] [--json FILE]

8B shapes at 8, 64 and 512 ranks, 405B shapes at 256: AdamW in fp32, each rank with its rows of every tensor. The plans
are real, the data files are sparse: what is measured depends on their number and not on their bytes. Ours and DCP's
take turns. DCP runs as it does in a job, with Python's collector on; its times with the collector off, as we run it,
are told beside. Memory is anonymous memory beyond what was there, sampled while the work runs.
"""

from __future__ import annotations

import gc
import pickle
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.compose import Simulated
from benchmarks.harness import LLAMA_8B, llama_shapes, ratio, scratch
from benchmarks.memory import Watch
from benchmarks.table import Row, publish, row
from tailor_dcp import inspect, merge
from tailor_dcp.collector import collector_off
from tailor_dcp.metadata.safe_pickle import read
from tailor_dcp.recipes.native import Recipe, Take

LLAMA_405B = llama_shapes(126, 16384, 128256, heads_kv=1024, wide=53248)
RUNS = {
    "8B at 8": (Simulated(LLAMA_8B, 8), 5),
    "8B at 64": (Simulated(LLAMA_8B, 64), 3),
    "8B at 512": (Simulated(LLAMA_8B, 512), 1),
    "405B at 256": (Simulated(LLAMA_405B, 256), 1),
}
"""What is simulated: shapes and ranks, and how many rounds."""
POLICIES = ("full", "parity")
_BAR = 0.15
_MEBI = 1 << 20
Times = dict[str, list[float]]


def main(
    quick: Annotated[bool, typer.Option(help="Only up to 64 ranks.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Of the sizes, these.")] = None,
    watch: Annotated[tuple[str, Path] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure all sizes."""
    if watch:
        work = _works(watch[1])[watch[0]]
        with Watch() as watched:
            work()
        print(watched.peak)
        return
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for name in only or list(RUNS)[: 2 if quick else None]:
        with scratch(".") as folder:
            found, details[name] = _measure(*RUNS[name], folder)
        rows += _rows(name, found, details[name])
    publish("Metadata of large jobs, simulated ranks, AdamW in fp32", rows, out, runs=details)


def _measure(simulated: Simulated, rounds: int, folder: Path) -> tuple[Times, dict[str, Any]]:
    run, stock = folder / "run", folder / "stock"
    size = simulated.write(run / "step-1")
    simulated.write(run / "step-3")
    stock.write_bytes(pickle.dumps(simulated.stock_metadata()))
    times: Times = defaultdict(list)
    works = _works(folder)
    for _ in range(rounds):
        planning, dumping = simulated.time_stock()
        times["DCP plan"].append(planning)
        times["DCP dump"].append(dumping)
        with collector_off():
            times["DCP plan and dump, no collector"].append(sum(simulated.time_stock()))
        for policy in POLICIES:
            ours = simulated.time_ours(policy, run)
            times[f"{policy}: added"].append(ours.added)
            times[f"{policy}: dump"].append(ours.dump)
            times[f"{policy}: whole"].append(ours.whole)
        for name, work in works.items():
            gc.collect()
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
            shutil.rmtree(folder / "merged", ignore_errors=True)
    details = {
        "metadata_bytes": size,
        "stock_metadata_bytes": stock.stat().st_size,
        "seconds": {name: [round(t, 4) for t in found] for name, found in times.items()},
        "peak_mib": {name: _peak(name, folder) // _MEBI for name in works},
    }
    return times, details


def _works(folder: Path) -> dict[str, Callable[[], Any]]:
    run, stock = folder / "run", folder / "stock"
    ours = run / "step-1" / ".metadata"
    return {
        "DCP read": lambda: _unpickle(stock),
        "DCP read of ours": lambda: _unpickle(ours),
        "read": lambda: read(ours),
        "read of DCP's": lambda: read(stock),
        "inspect": lambda: inspect(run / "step-1"),
        "merge": lambda: _merge(run, folder / "merged"),
    }


def _peak(name: str, folder: Path) -> int:
    """Return the memory that a piece of work takes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--watch", name, str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    return int(told.stdout)


def _unpickle(path: Path) -> object:
    with path.open("rb") as stream:  # as FileSystemReader.read_metadata does
        return pickle.load(stream)


def _merge(run: Path, out: Path) -> None:
    merge(Recipe(f"{run}/step-3", (Take("model.layers.*[13579]", f"{run}/step-1"),)), out)


def _rows(name: str, times: Times, details: dict[str, Any]) -> list[Row]:
    dcp = [a + b for a, b in zip(times["DCP plan"], times["DCP dump"], strict=True)]
    quiet = times["DCP plan and dump, no collector"]
    rows = []
    for policy in POLICIES:
        bar = _BAR if name == "8B at 512" else None
        added = times[f"{policy}: added"]
        rows.append(row(f"{name}: {policy}, added", "DCP's plan + dump", "time", ratio(added, dcp), bar))
        rows.append(row(f"{name}: {policy}, added", "the same, no collector", "time", ratio(added, quiet)))
        rows.append(row(f"{name}: {policy}, all", "DCP's plan + dump", "time", ratio(times[f"{policy}: whole"], dcp)))
    for work, beside in (
        ("full: dump", "DCP dump"),
        ("read", "DCP read"),
        ("read of DCP's", "DCP read"),
        ("DCP read of ours", "DCP read"),
        ("inspect", "DCP read"),
        ("merge", "DCP read"),
    ):
        rows.append(
            row(f"{name}: {work}", beside, "time", ratio(times[work], times[beside]), note=_note(work, times, details))
        )
    size = details["metadata_bytes"] / details["stock_metadata_bytes"]
    note = f"{details['metadata_bytes'] / 1e6:.1f} MB, checksums included"
    return [*rows, row(f"{name}: .metadata", "DCP's own", "bytes", size, note=note)]


def _note(work: str, times: Times, details: dict[str, Any]) -> str:
    peak = f", {details['peak_mib'][work]} MiB" if work in details["peak_mib"] else ""
    return f"{median(times[work]):.2f} s{peak}"


if __name__ == "__main__":
    typer.run(main)
