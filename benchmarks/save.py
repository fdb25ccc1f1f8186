"""What a save costs beside stock DCP: time on tmpfs and on disk, bytes written, rate of the writer.

    python -m benchmarks.save [--ranks 2] [--pairs 20] [--place /dev/shm] [--json FILE]

Each number is a ratio of interleaved pairs in one run; the ratio of stock DCP against itself
stands beside it, for that is what the machine can tell apart.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.harness import (
    Work,
    interleave,
    llama_shapes,
    rank,
    ratio,
    scratch,
    tensor_bytes,
    training_state,
)
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, LayerwiseWriter, forget, inspect
from tailor_dcp.inspection import Inspection

SHAPES = llama_shapes(layers=8, hidden=768, vocab=8192)  # 88 M parameters: 1.06 GB with Adam's moments
SELECTIVE = ("parity", "moments:every=5", "moments:every=5,weights=bf16", "filter:head=1,tail=1,every=5")
QUIET = 0.05  # seconds that any save may take for links and metadata


def main(
    ranks: Annotated[int, typer.Option(help="Processes that save together.")] = 0,
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 20,
    place: Annotated[str, typer.Option(help="Where to save; default: tmpfs, then the disk.")] = "",
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Run at one and two ranks, on tmpfs and on disk, unless told otherwise."""
    if "RANK" in os.environ:
        measure(pairs, Path(place), out)
        sys.stdout.flush()
        os._exit(0)  # a thread of gloo's sometimes aborts a process that ends in the ordinary way
    places = [place] if place else ["/dev/shm", "."]
    with scratch(".") as results:
        for where in places:
            for world in [ranks] if ranks else [1, 2]:
                _run(world, pairs if where == "/dev/shm" or place else max(5, pairs // 4), where, results)
        rows = [Row(**one) for path in sorted(results.glob("*.json")) for one in json.loads(path.read_text())]
    publish(f"Saving {tensor_bytes(SHAPES) / 1e9:.2f} GB, {pairs} pairs (on disk a quarter of them)", rows, out)


def _run(world: int, pairs: int, where: str, results: Path) -> None:
    name = f"{'tmpfs' if where == '/dev/shm' else 'disk'}-{world}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [__file__, f"--pairs={pairs}", f"--place={Path(where).resolve()}", f"--json={results / name}"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."})


def measure(pairs: int, place: Path, out: Path | None) -> None:
    """Measure on the ranks that torchrun started."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (world,)) if world > 1 else None
    state = training_state(SHAPES, mesh)
    with scratch(str(place)) as folder:
        base = folder / "step-1"
        dcp.save(state, storage_writer=LayerwiseWriter(base), planner=LayerwisePlanner("full", base=None))
        works = _works(state, folder, base)
        reset = _remover(folder / "step-2")
        times = interleave(works, pairs, reset)
        written = dict(_looks(works, folder / "step-2", reset))
    if rank() == 0:
        rows = [asdict(one) for one in _rows(times, written, place, world)]
        if out:
            out.write_text(json.dumps(rows))
    if dist.is_initialized():
        dist.destroy_process_group()


def _works(state: dict[str, Any], folder: Path, base: Path) -> dict[str, Work]:
    target = folder / "step-2"

    def stock() -> None:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(target))

    def ours(policy: str, writer: type[Any], of: Path | None) -> Work:
        def save() -> None:
            forget()
            dcp.save(state, storage_writer=writer(target), planner=LayerwisePlanner(policy, base=of))

        return save

    works: dict[str, Work] = {
        "stock": stock,
        "stock again": stock,
        "full": ours("full", dcp.FileSystemWriter, None),
        "full, LayerwiseWriter": ours("full", LayerwiseWriter, None),
        "bare write + fsync": lambda: _bare(state, target),
    }
    return works | {policy: ours(policy, dcp.FileSystemWriter, base) for policy in SELECTIVE}


def _bare(state: dict[str, Any], target: Path) -> None:
    """Write the bytes of all local tensors to one file and sync it: the least that any save does."""
    target.mkdir(exist_ok=True)
    with (target / f"bare{rank()}").open("wb", buffering=0) as stream:
        for tensor in _local_tensors(state):
            view = memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
            while view:
                view = view[stream.write(view) :]
        os.fsync(stream.fileno())


def _local_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, DTensor):
        yield value.to_local()
    elif isinstance(value, torch.Tensor):
        yield value if value.dim() else value.reshape(1)
    elif isinstance(value, dict):
        for child in value.values():
            yield from _local_tensors(child)


def _remover(target: Path) -> Work:
    def remove() -> None:
        if rank() == 0:
            shutil.rmtree(target, ignore_errors=True)

    return remove


def _looks(works: dict[str, Work], target: Path, reset: Work) -> Iterator[tuple[str, tuple[Inspection, int]]]:
    """Save once more with each of our ways and look at what lies on disk."""
    for name, work in works.items():
        if name.startswith(("stock", "bare")):
            continue
        work()
        if rank() == 0:
            yield name, (inspect(target), _new_bytes(target))
        reset()


def _new_bytes(target: Path) -> int:
    """Return the bytes that a save added to the disk, its metadata left out."""
    return sum(path.stat().st_size for path in target.glob("*.distcp"))


def _rows(
    times: dict[str, list[float]], looks: dict[str, tuple[Inspection, int]], place: Path, world: int
) -> list[Row]:
    tmpfs = str(place) == "/dev/shm"
    where = f"{world} rank{'s' if world > 1 else ''}, {'tmpfs' if tmpfs else 'disk'}"

    def timed(name: str, beside: str, bar: float | None = None, note: str = "") -> Row:
        # A disk scatters too much for a bar to mean anything there.
        return row(
            f"{name} ({where})", beside, "time", ratio(times[name], times[beside]), bar if tmpfs else None, False, note
        )

    seconds = sorted(times["full"])[len(times["full"]) // 2]
    rows = [
        timed("stock again", "stock", note="what this machine can tell apart"),
        timed("full", "stock", 1.03),
        timed("full, LayerwiseWriter", "stock"),
        timed("full, LayerwiseWriter", "bare write + fsync", 1 / 0.85),
        timed("stock", "bare write + fsync"),
    ]
    for policy in SELECTIVE:
        fraction = looks[policy][1] / looks["full"][1]
        rows.append(timed(policy, "full", fraction / 0.9 + QUIET / seconds, f"{fraction:.3f} of its bytes"))
    return rows + [
        row(f"{name} ({where})", "the tensors due", "bytes on disk", _excess(looks[name]), 1.01)
        for name in ("full", "full, LayerwiseWriter", *SELECTIVE)
    ]


def _excess(look: tuple[Inspection, int]) -> float:
    """Return bytes on disk over the bytes of the tensors that were due."""
    found, on_disk = look
    due = sum(u.tensor_bytes for u in found.units if u.stale_saves == 0)
    return on_disk / due


if __name__ == "__main__":
    typer.run(main)
