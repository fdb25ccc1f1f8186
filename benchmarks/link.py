"""Linking to a ZeRO-3 checkpoint: beside DeepSpeed's own converters, and beside a hundred times as many bytes.

    python -m benchmarks.link [--pairs 5] [--place /dev/shm] [--json FILE]

1.3 GB that two real engines saved are linked to, read by ``zero_to_fp32`` and converted by ``ds_to_universal``.
The shapes of an 8B model, 96 GB of holes in sparse files, are only linked to. Each piece of work runs in a process of
its own, which has imported what it needs before the clock starts. Linking does not depend on size, and is Python's
work nearly all: on a busy machine the processor's seconds tell more than the clock's.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.convert import _checkpoint, _prepared
from benchmarks.harness import LLAMA_8B, ratio, scratch
from benchmarks.table import Row, publish, row

LINK, LINK_LARGE = "--link, 1.3 GB", "--link, 96 GB sparse"
THEIRS = ("zero_to_fp32", "ds_to_universal")
WORKS = (LINK, LINK_LARGE, *THEIRS)
_BAR = 0.3


def main(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 5,
    place: Annotated[Path, typer.Option(help="Where to convert.")] = Path("/dev/shm"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
    work: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure all of them; exit with 1 if the bar is missed."""
    if work:
        print(*_measured(work, place, out or Path("out")))
    else:
        _compare(pairs, place, out)


def _compare(pairs: int, place: Path, out: Path | None) -> None:
    with scratch(str(place)) as folder:
        small = _checkpoint(folder / "small", large=False)
        large = sparse(folder / "large")
        found = [_round(folder, turn) for turn in range(-1, pairs)][1:]
    times = {name: [row[name][0] for row in found] for name in WORKS}
    busy = {name: [row[name][1] for row in found] for name in WORKS}
    middle = {name: statistics.median(held) for name, held in times.items()}
    rows = [_row(beside, times, busy) for beside in (*THEIRS, LINK_LARGE)]
    rows += [
        row(name, f"{_BAR} s", "time beyond imports", middle[name] / _BAR, 1.0, note=f"{middle[name]:.3f} s")
        for name in (LINK, LINK_LARGE)
    ]
    publish(f"Linking to ZeRO-3, 2 ranks, {small / 1e9:.2f} GB and {large / 1e9:.0f} GB, {pairs} pairs", rows, out)


def _row(beside: str, times: dict[str, list[float]], busy: dict[str, list[float]]) -> Row:
    note = f"{statistics.median(times[beside]):.2f} s, {statistics.median(busy[beside]):.2f} s of the processor"
    return row(LINK, beside, "time", ratio(times[LINK], times[beside]), note=f"its {note}")


def _round(folder: Path, turn: int) -> dict[str, tuple[float, float]]:
    """Do each piece of work once, in an order that is turned round from round to round."""
    done = {}
    for name in WORKS if turn % 2 else reversed(WORKS):
        source = folder / ("large" if name == LINK_LARGE else "small")
        words = [sys.executable, "-m", "benchmarks.link", "--work", name, "--place", str(source)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        told = subprocess.run(
            [*words, "--json", str(folder / "out")], capture_output=True, text=True, check=False, env=environment
        )
        if told.returncode:
            raise RuntimeError(f"{name} failed: {told.stderr[-2000:]}")
        seconds, busy = told.stdout.strip().splitlines()[-1].split()
        done[name] = (float(seconds), float(busy))
        shutil.rmtree(folder / "out")
    return done


def _measured(work: str, source: Path, target: Path) -> tuple[float, float]:
    """Return the seconds that a piece of work took, and those that this process's threads computed in them."""
    run = _linking(source, target) if work in (LINK, LINK_LARGE) else _prepared(work, source, target)
    start, busy = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - busy


def _linking(source: Path, target: Path) -> Any:
    from tailor_dcp.converters import Options, convert, link_target, zero_source  # noqa: F401

    with FakeTensorMode():  # which imports more when it is first used; files that cannot be mapped are opened with it
        torch.empty(1)
    return lambda: convert(source, target, "dcp", options=Options(link=True))


def sparse(folder: Path) -> int:
    """Make a ZeRO-3 checkpoint of an 8B model whose tensors are holes; return its bytes."""
    from tailor_dcp.catalog import Catalog
    from tailor_dcp.converters import Options, zero3_target, zero_target
    from tailor_dcp.tensors import Given, Zeros

    weights = {name: Zeros(torch.Size(shape), torch.float32) for name, shape in LLAMA_8B.items()}
    state = {
        name: {
            "step": Given(torch.tensor(5.0)),
            "exp_avg": Zeros(weight.size, weight.dtype),
            "exp_avg_sq": Zeros(weight.size, weight.dtype),
        }
        for name, weight in weights.items()
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": list(weights)}
    catalog = Catalog(source=folder, format="dcp", weights=weights, state=state, groups=(group,), train={"step": 5})
    fill = zero_target.fill
    zero_target.fill = lambda *_: []
    try:
        zero3_target.write(catalog, folder, folder, Options(world_size=2))
    finally:
        zero_target.fill = fill
    return sum(path.stat().st_size for path in folder.rglob("*.pt"))


if __name__ == "__main__":
    typer.run(main)
