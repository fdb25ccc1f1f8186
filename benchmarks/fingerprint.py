"""Fingerprints against reading the same tensors once, on one core.

    python -m benchmarks.fingerprint [--mb 256] [--threads 1] [--device cuda] [--json FILE]

Reading is ``torch.sum`` of the same bytes as int64, and numpy's xor of them: about the least that
anything can do which looks at every bit.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.harness import Work, interleave, ratio
from benchmarks.table import Row, publish, row
from tailor_dcp.fingerprint import fingerprint

ORDINARY = "fp32, rows of a power of two"
GOAL = 0.5  # of the rate of reading


def cases(mb: int, device: str) -> dict[str, tuple[torch.Tensor, list[int], list[int]]]:
    """Return chunks to measure: a name, then what ``fingerprint`` takes."""
    rows = mb * 10**6 // (4096 * 8) * 2  # even, so that any row length makes whole words of 8 bytes
    whole = torch.randn(rows, 4096, device=device)
    odd = torch.randn(rows, 4095, device=device)
    return {
        ORDINARY: (whole, [0, 0], [rows, 4096]),
        "fp32, the last of two shards of columns": (whole, [0, 4096], [rows, 8192]),
        "fp32, odd rows at an odd place": (odd, [3, 0], [rows + 3, 4095]),
        "bf16": (whole.bfloat16(), [0, 0], [rows, 4096]),
    }


def measure(name: str, chunk: torch.Tensor, offsets: list[int], size: list[int], rounds: int) -> list[Row]:
    """Time one chunk against reading it."""
    words = chunk.reshape(-1).view(torch.int64)

    def ours() -> None:
        fingerprint(chunk, offsets, size)

    def read() -> None:
        words.sum().item()  # waits for a GPU

    works: dict[str, Work] = {"fingerprint": ours, "torch.sum": read}
    if not chunk.is_cuda:
        array = words.numpy()
        works["numpy xor"] = lambda: np.bitwise_xor.reduce(array)
    times = interleave(works, rounds, reset=lambda: None, warm_up=2)
    note = f"{words.nbytes / 1e9 / statistics.median(times['fingerprint']):.2f} GB/s"
    # The bar is of the work on ordinary chunks, and of reading in the way that a user would.
    bars = {"torch.sum": GOAL if name == ORDINARY else None}
    return [
        row(
            f"fingerprint, {name}",
            beside,
            "rate",
            ratio(times[beside], times["fingerprint"]),
            bars.get(beside),
            True,
            note,
        )
        for beside in works
        if beside != "fingerprint"
    ]


def main(
    mb: Annotated[int, typer.Option(help="Size of each chunk in MB.")] = 256,
    rounds: Annotated[int, typer.Option(help="How often each piece of work is timed.")] = 15,
    threads: Annotated[int, typer.Option(help="Cores to use.")] = 1,
    device: Annotated[str, typer.Option(help="Where the tensors are.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure all cases."""
    torch.set_num_threads(threads)
    rows = [one for name, case in cases(mb, device).items() for one in measure(name, *case, rounds)]
    publish(f"Fingerprints of {mb} MB on {threads} cores of {device}, {rounds} pairs", rows, out, threads=threads)


if __name__ == "__main__":
    typer.run(main)
