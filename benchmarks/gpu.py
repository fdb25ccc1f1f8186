"""What only a GPU can show: the stall of an asynchronous save, a load into GPU memory, the rate of the way there.

    python -m benchmarks.gpu [--pairs 7] [--place /dev/shm] [--json FILE]

Without CUDA it says so and measures nothing. Everything is in the page cache, the tensors are on the GPU before the
clock starts, and every piece of work ends when the GPU has done its part.
"""

from __future__ import annotations

import os
import shutil
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.harness import Work, interleave, llama_shapes, ratio, scratch, tensor_bytes, training_state
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, LayerwiseReader, forget

SHAPES = llama_shapes(layers=8, hidden=1536, vocab=16384)  # 352 M parameters: 4.2 GB with Adam's moments
POLICIES = ("full", "moments:every=5", "parity:groups=5")
_WINDOW = 64 << 20


def main(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 7,
    place: Annotated[Path, typer.Option(help="Where the checkpoints are.")] = Path("/dev/shm"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure the rows that need a GPU."""
    if not torch.cuda.is_available():
        typer.echo("There is no CUDA device here, so nothing was measured; run this on a machine with a GPU.")
        return
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = _on_gpu(training_state(SHAPES))
    with scratch(str(place)) as folder:
        full = folder / "step-1"
        dcp.save(state, checkpoint_id=full, planner=LayerwisePlanner("full", base=None))
        rows = [*_loads(state, full, pairs), *_stalls(state, folder, full, pairs)]
    dist.destroy_process_group()
    title = f"{torch.cuda.get_device_name()}, {tensor_bytes(SHAPES) / 1e9:.2f} GB, {pairs} pairs"
    publish(title, rows, out, device=torch.cuda.get_device_name())


def _on_gpu(value: Any) -> Any:
    """Return a nested state dict with its tensors on the GPU, Adam's 0-d steps left where training keeps them."""
    if isinstance(value, dict):
        return {key: _on_gpu(part) for key, part in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) and value.dim() else value


# Loads -------------------------------------------------------------------------------------


def _loads(state: dict[str, Any], folder: Path, pairs: int) -> list[Row]:
    def load(reader: Callable[[], Any]) -> Work:
        return _finished(lambda: dcp.load(state, storage_reader=reader()))

    works = {
        "ours": load(lambda: LayerwiseReader(folder)),
        "atomic": load(lambda: LayerwiseReader(folder, atomic=True)),
        "stock": load(lambda: FileSystemReader(folder)),
        "bare": _finished(_bare(folder)),
        "pinned": _finished(_copies(pin=True)),
        "pageable": _finished(_copies(pin=False)),
    }
    times = interleave(works, pairs, lambda: None)
    gigabytes = tensor_bytes(SHAPES) / 1e9
    rates = {name: f"{gigabytes / statistics.median(found):.1f} GB/s" for name, found in times.items()}
    return [
        row("load", "stock", "speed", ratio(times["stock"], times["ours"]), 2, True, rates["ours"]),
        row("load", "preadv, then a copy", "speed", ratio(times["bare"], times["ours"]), 0.8, True, rates["bare"]),
        row("load, atomic=True", "the fast load", "speed", ratio(times["ours"], times["atomic"]), note=rates["atomic"]),
        row("H2D, pinned", "H2D, pageable", "speed", ratio(times["pageable"], times["pinned"]), note=rates["pinned"]),
    ]


def _finished(work: Work) -> Work:
    def both() -> None:
        work()
        torch.cuda.synchronize()

    return both


def _bare(folder: Path) -> Work:
    """Return a loop that reads all files into one pinned window and copies each window to the GPU."""
    paths = sorted(folder.glob("*.distcp"))
    window = torch.empty(_WINDOW, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_WINDOW, dtype=torch.uint8, device="cuda")
    memory: Any = window.numpy()

    def work() -> None:
        for path in paths:
            file = os.open(path, os.O_RDONLY)
            offset = 0
            while count := os.preadv(file, [memory], offset):
                target[:count].copy_(window[:count])
                offset += count
            os.close(file)

    return work


def _copies(pin: bool) -> Work:
    """Return copies from memory to the GPU of as many bytes as the state has."""
    window = torch.ones(_WINDOW, dtype=torch.uint8).pin_memory() if pin else torch.ones(_WINDOW, dtype=torch.uint8)
    target = torch.empty(_WINDOW, dtype=torch.uint8, device="cuda")

    def work() -> None:
        for start in range(0, tensor_bytes(SHAPES), _WINDOW):
            count = min(_WINDOW, tensor_bytes(SHAPES) - start)
            target[:count].copy_(window[:count], non_blocking=True)

    return work


# Stalls ------------------------------------------------------------------------------------


def _stalls(state: dict[str, Any], folder: Path, base: Path, pairs: int) -> list[Row]:
    """Measure the time until ``dcp.async_save`` returns, with a thread and stagers that keep nothing."""
    target, group = folder / "step-2", dist.new_group()
    pending: list[Any] = []

    def start(planner: LayerwisePlanner | None, stager: Any) -> None:
        writer = dcp.FileSystemWriter(target)
        pending.append(
            dcp.async_save(state, storage_writer=writer, planner=planner, process_group=group, async_stager=stager)
        )

    def ours(policy: str) -> Work:
        def save() -> None:
            forget()
            planner = LayerwisePlanner(policy, base=base)
            start(planner, planner.stager(target, group))

        return save

    def finish() -> None:
        for one in pending:
            getattr(one, "upload_completion", one).result()
        pending.clear()
        shutil.rmtree(target, ignore_errors=True)

    works: dict[str, Work] = {policy: ours(policy) for policy in POLICIES}
    works["stock"] = lambda: start(None, DefaultStager(StagingOptions(False, False, False, False)))
    times = interleave(works, pairs, finish)
    return [
        row(
            f"async save, {policy}", "stock", "stall", ratio(times[policy], times["stock"]),
            note=f"{1000 * statistics.median(times[policy]):.0f} ms",
        )
        for policy in POLICIES
    ]  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
