"""Savings beside published ones: bytes at Llama-3.1-8B's shapes by arithmetic, bytes and times of real saves.

    python -m benchmarks.published [--pairs 3] [--place /dev/shm] [--json FILE]

Published by LLMTailor (PDSW'25): parity 2 times smaller and 1.6 times faster; filter 4.3 times smaller and 2.8 to 3.0
times faster, in a setting that is not published. Measured updates of other systems reach 149 and 29 times, where most
of a model rests. Ours are averages over whole cycles of a policy, the first save, which is always full, left out. Real
saves are of 82 M parameters in 32 layers, and their moments, in fp32.
"""

from __future__ import annotations

import shutil
import statistics
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
import typer

from benchmarks.harness import LLAMA_8B, Ratio, llama_shapes, ratio, scratch, tensor_bytes, training_state
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, LayerwiseWriter, forget, inspect, simulate
from tailor_dcp.coordination import RankInfo, gather
from tailor_dcp.layers import LayerMap
from tailor_dcp.metadata.compose import Shape
from tailor_dcp.selection import State

SHAPES = llama_shapes(layers=32, hidden=384, vocab=8192)
DEFAULT = "moments:every=5,weights=bf16,moments=bf16"
POLICIES = {
    "parity": (2, "x 2.0 smaller, x 1.6 faster"),
    "filter:every=5": (5, "filter, setting unknown: x 4.3 smaller, x 2.8 to 3.0 faster"),
    "filter:every=5,aux=rest": (5, "the same"),
    "filter:every=8,aux=rest": (8, "the same"),
    DEFAULT: (5, "-"),
}
"""Each policy, how many saves make a cycle, and what was published."""
ZERO_3 = 14
"""Bytes that ZeRO-3 saves of each parameter: bf16 weights, and fp32 master weights and moments."""
RESTING = ("unchanged+full", "drift:threshold=0.001,states=0.001,max_stale=1000")
MOVING = "model.layers.31."
"""The only layer that trains where most layers rest."""


def main(
    pairs: Annotated[int, typer.Option(help="Cycles of each policy, beside as many full saves.")] = 3,
    place: Annotated[Path, typer.Option(help="Where to save.")] = Path("/dev/shm"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Compute and measure all of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    state = training_state(SHAPES)
    rows = list(_computed())
    with scratch(str(place)) as folder:
        for policy, (cycle, published) in POLICIES.items():
            rows += _measured(state, policy, cycle * pairs, folder, f"published {published}")
        for policy in RESTING:
            rows += _measured(state, policy, 5 * pairs, folder, "published up to x 149 and x 29", moving=True)
    publish(f"Savings, {tensor_bytes(SHAPES) / 1e9:.2f} GB, {pairs} cycles of each policy", rows, out)


def _computed() -> Iterator[Row]:
    state = eight_billion()
    for policy, (cycle, published) in POLICIES.items():
        found = simulate(state, policy, steps=8 * cycle + 1)
        note = f"computed; published {published}"
        yield row(f"{policy}, 8B shapes", "full saves", "times fewer bytes", found.full / found.later, note=note)
    found = simulate(state, DEFAULT, steps=41)
    smaller = ZERO_3 * found.parameters / found.later
    note = "computed; no weight is older than the save"
    yield row(f"{DEFAULT}, 8B shapes", "ZeRO-3's 14 bytes a parameter", "times fewer bytes", smaller, 4.9, True, note)


def eight_billion() -> State:
    """Return the state of Llama-3.1-8B with AdamW in fp32."""
    paths: dict[str, tuple[str | int, ...]] = {}
    shapes: dict[str, Shape] = {}
    for fqn, shape in LLAMA_8B.items():
        for path in (("model", fqn), *(("optim", "state", fqn, kind) for kind in ("exp_avg", "exp_avg_sq"))):
            paths[".".join(path)] = path
            shapes[".".join(path)] = Shape(torch.Size(shape), torch.float32)
    return gather([RankInfo(paths, shapes, ())], LayerMap(), None)


def _measured(
    state: dict[str, Any], policy: str, saves: int, folder: Path, note: str, moving: bool = False
) -> Iterator[Row]:
    """Save by a policy and in full in turns; yield how many times fewer bytes and less time the policy takes."""
    ours: list[float] = []
    theirs: list[float] = []
    written: list[int] = []
    timed = zip(
        _saves(state, policy, folder / "ours", moving), _saves(state, "full", folder / "full", False), strict=False
    )
    for number, ((path, seconds), (other, full)) in enumerate(islice(timed, saves + 1)):
        if number:  # the first is full by any policy
            ours.append(seconds)
            theirs.append(full)
            written.append(inspect(path).written)
        whole = inspect(other).written
    for run in ("ours", "full"):
        shutil.rmtree(folder / run)
    where = f"{policy}, one layer of 32 trains" if moving else policy
    yield row(where, "full saves", "times fewer bytes", whole / statistics.mean(written), note=note)
    yield row(where, "full saves", "times faster", _faster(ours, theirs), note=f"{note}; means of all saves")


def _faster(ours: list[float], theirs: list[float]) -> Ratio:
    """Return the ratio of the times of whole runs, with the interval of the pairs' ratios."""
    spread = ratio(theirs, ours)
    middle = sum(theirs) / sum(ours)
    return Ratio(middle, min(middle, spread.low), max(middle, spread.high))


def _saves(state: dict[str, Any], policy: str, run: Path, moving: bool) -> Iterator[tuple[Path, float]]:
    """Save again and again, keeping the last two; yield each folder and how long it took."""
    step = 0
    while True:
        step += 1
        if moving:
            _train(state)
        path = run / f"step-{step}"
        forget()
        base = run / f"step-{step - 1}" if step > 1 else None
        began = time.perf_counter()
        dcp.save(state, storage_writer=LayerwiseWriter(path), planner=LayerwisePlanner(policy, base=base))
        yield path, time.perf_counter() - began
        shutil.rmtree(run / f"step-{step - 2}", ignore_errors=True)


def _train(state: dict[str, Any]) -> None:
    """Change the layer that trains."""
    for fqn, weight in state["model"].items():
        if fqn.startswith(MOVING):
            weight.mul_(1.01)
            for kind in ("exp_avg", "exp_avg_sq"):
                state["optim"]["state"][fqn][kind].mul_(0.9)


if __name__ == "__main__":
    typer.run(main)
