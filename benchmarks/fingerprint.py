"""Fingerprints against reading the same tensors once, on one core.

    python -m benchmarks.fingerprint [--mb 256] [--threads 1] [--device cuda] [--json FILE]

Reading is ``torch.sum`` of the same bytes as int64, and numpy's xor of them: about the least that
anything can do which looks at every bit.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Work, as_dict, interleave, machine, ratio
from tailor_dcp.fingerprint import fingerprint


def cases(mb: int, device: str) -> dict[str, tuple[torch.Tensor, list[int], list[int]]]:
    """Return chunks to measure: a name, then what ``fingerprint`` takes."""
    rows = mb * 10**6 // (4096 * 8) * 2  # even, so that any row length makes whole words of 8 bytes
    whole = torch.randn(rows, 4096, device=device)
    odd = torch.randn(rows, 4095, device=device)
    return {
        "fp32, rows of a power of two": (whole, [0, 0], [rows, 4096]),
        "fp32, the last of two shards of columns": (whole, [0, 4096], [rows, 8192]),
        "fp32, odd rows at an odd place": (odd, [3, 0], [rows + 3, 4095]),
        "bf16": (whole.bfloat16(), [0, 0], [rows, 4096]),
    }


def measure(chunk: torch.Tensor, offsets: list[int], size: list[int], rounds: int) -> dict[str, Any]:
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
    rates = {name: words.nbytes / 1e9 / statistics.median(seconds) for name, seconds in times.items()}
    return {"rates": rates, "ratios": {n: ratio(times[n], times["fingerprint"]) for n in works if n != "fingerprint"}}


def main(
    mb: Annotated[int, typer.Option(help="Size of each chunk in MB.")] = 256,
    rounds: Annotated[int, typer.Option(help="How often each piece of work is timed.")] = 15,
    threads: Annotated[int, typer.Option(help="Cores to use.")] = 1,
    device: Annotated[str, typer.Option(help="Where the tensors are.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Measure all cases."""
    torch.set_num_threads(threads)
    found = {name: measure(*case, rounds) for name, case in cases(mb, device).items()}
    table = Table(title=f"Fingerprints of {mb} MB on {threads} cores of {device}", title_justify="left")
    for column in ("chunk", "what", "GB/s", "our speed as a part of it"):
        table.add_column(column)
    for name, case in found.items():
        for what, rate in case["rates"].items():
            table.add_row(name, what, f"{rate:.2f}", str(case["ratios"].get(what, "")))
    Console(width=130).print(table)
    if out:
        rows = [
            {"chunk": name, "rates": c["rates"], "ratios": {n: as_dict(r) for n, r in c["ratios"].items()}}
            for name, c in found.items()
        ]
        out.write_text(json.dumps({"machine": machine(), "mb": mb, "threads": threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
