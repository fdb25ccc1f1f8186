"""What verifying costs beside only reading the same bytes.

    python -m benchmarks.verify [--pairs 15] [--json FILE]

A composite of ``LayerwiseWriter``'s, where records have checksums of whole blobs, and a stock checkpoint, where
checksums are torch's and frames are made anew, each verified beside reading the same files to memory and dropping them:
with as many threads, and with one, as ``cat`` does. All is read from the page cache, in memory, where nothing waits for
a disk: the most that verifying can cost. Each number is a ratio of interleaved pairs in one run.
"""

from __future__ import annotations

import os
import statistics
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed.checkpoint as dcp
import typer

from benchmarks.harness import Work, interleave, llama_shapes, ratio, scratch, training_state
from benchmarks.table import Row, publish, row
from tailor_dcp import LayerwisePlanner, LayerwiseWriter, verify
from tailor_dcp.materialize import cores

SHAPES = llama_shapes(layers=4, hidden=1536, vocab=8192)  # 176 M parameters: 2.1 GB with Adam's moments
STEPS = 2
BAR = 0.7
_WINDOW = 1 << 20


def main(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 15,
    place: Annotated[Path, typer.Option(help="A folder in memory.")] = Path("/dev/shm"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure both kinds of checkpoint; exit with 1 if a bar is missed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[Row] = []
    with scratch(str(place)) as folder:
        state = training_state(SHAPES)
        for step in range(1, STEPS + 1):
            writer = LayerwiseWriter(folder / "run" / f"step-{step}")
            dcp.save(state, storage_writer=writer, planner=LayerwisePlanner(f"parity:groups={STEPS}"))
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "stock", thread_count=2))
        size = 0
        for name, checkpoint in (
            ("LayerwiseWriter's checkpoint", folder / "run" / f"step-{STEPS}"),
            ("a stock checkpoint", folder / "stock"),
        ):
            found, size = _measured(name, checkpoint, pairs)
            rows += found
    publish(f"verifying {size / 1e9:.2f} GB, {pairs} pairs", rows, out, bytes=size)


def _measured(name: str, checkpoint: Path, pairs: int) -> tuple[list[Row], int]:
    """Return the rows, and the bytes that are read."""
    paths = [path for path in checkpoint.rglob("*.distcp") if path.is_file()]
    found = verify(checkpoint)
    assert not found.damaged
    threads = cores()
    works: dict[str, Work] = {
        "verify": lambda: _checked(checkpoint),
        "read": lambda: _read(paths, threads),
        "read by one": lambda: _read(paths, 1),
    }
    times = interleave(works, pairs, lambda: None)
    rate = found.bytes / statistics.median(times["verify"]) / 1e9
    return [
        row(
            name, f"reading it, {threads} threads", "rate", ratio(times["read"], times["verify"]), BAR, at_least=True,
            note=f"{rate:.1f} GB/s",
        ),
        row(name, "reading it, one thread", "rate", ratio(times["read by one"], times["verify"]), None, at_least=True),
    ], found.bytes  # fmt: skip


def _checked(checkpoint: Path) -> None:
    assert not verify(checkpoint).damaged


def _read(paths: list[Path], threads: int) -> None:
    """Read files to the end, each by one thread."""
    memory = threading.local()

    def read(path: Path) -> None:
        if not hasattr(memory, "window"):
            memory.window = memoryview(bytearray(_WINDOW))
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while os.readv(descriptor, [memory.window]):
                pass
        finally:
            os.close(descriptor)

    if threads == 1:
        for path in paths:
            read(path)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, sorted(paths, key=lambda path: -path.stat().st_size)):
            pass


if __name__ == "__main__":
    typer.run(main)
