"""Soak: thousands of saves, kills, resumes, world sizes and prunes of one run, and every kept checkpoint is as it was.

``python -m benchmarks.soak --saves 2000`` lives through a long training in one process tree: it saves by any policy, by
links, references and copies, with our writer and torch's, now and in the background, alone and on up to three ranks;
has savers killed with SIGKILL in the midst of it, and prunes as well; goes back, resumes at another world size, prunes
by any rule and compacts. What each checkpoint must hold is known from the keys and the moments of saving alone. The
process that does it all must not grow: its memory and its open files are measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness import machine
from benchmarks.soak_life import Soak
from tests.support.fleet import Fleet

_WARM_UP = 0.3
"""The share of all saves after which memory should not grow any more."""


@dataclass
class Finding:
    """What a soak has done and seen.

    Attributes:
        counts: how often each thing was done.
        world_sizes: the saves by the number of ranks.
        kept: checkpoints at the end.
        lost: sentences about what was not as it must be.
        seconds: that it took.
        memory: MiB of the process that lives through all of it, from the end of the warm-up, by saves.
        memory_slope: kB that it grows with each save, by least squares.
        open_files: the least and the most of that process since.
        machine: where it ran.
    """

    counts: dict[str, int]
    world_sizes: dict[str, int]
    kept: int
    lost: list[str]
    seconds: float
    memory: list[tuple[int, float]]
    memory_slope: float
    open_files: tuple[int, int]
    machine: dict[str, Any]


def soak(
    saves: int, seed: int, folder: Path | None, stock: Fleet, report: Callable[[int], None] = lambda _: None
) -> Finding:
    """Live through a run and tell what came of it.

    Args:
        saves: how many.
        seed: the same one lets the same things happen, but for the moments at which ranks are killed.
        folder: where the run goes; None for a temporary folder.
        stock: see ``Soak``.
        report: is told how many saves there were.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, prefix="soak") as parent:
        life = Soak(Path(parent) / "run", seed, stock)
        try:
            life.live(saves, report)
            life.finish()
        finally:
            life.close()
    warm = [use for use in life.uses if use[0] >= _WARM_UP * saves]
    memory = [(count, size / 2**20) for count, size, _ in warm]
    slope = statistics.linear_regression([count for count, _ in memory], [size * 1024 for _, size in memory]).slope
    files = [files for _, _, files in warm]
    return Finding(
        counts=dict(sorted(life.counts.items())),
        world_sizes={str(ranks): count for ranks, count in sorted(life.sizes.items())},
        kept=len(life.held),
        lost=life.lost,
        seconds=time.monotonic() - start,
        memory=memory[:: max(1, len(memory) // 10)],
        memory_slope=slope,
        open_files=(min(files), max(files)),
        machine=machine(),
    )


def main() -> int:
    """Soak, print what came of it, and end with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the run goes; a temporary folder of its own is made there")
    parser.add_argument("--json", type=Path, help="where to write the findings")
    options = parser.parse_args()
    tell, stock = Console(stderr=True), Fleet(2, stock=True)
    try:
        found = soak(options.saves, options.seed, options.folder, stock, lambda n: tell.print(f"{n} saves", end="\r"))
    finally:
        stock.close()
    if options.json:
        command = f"python -m benchmarks.soak --saves {options.saves} --seed {options.seed}"
        options.json.write_text(json.dumps({"command": command, **asdict(found)}, indent=1) + "\n")
    for line in lines(found):
        print(line)
    return 1 if found.lost else 0


def lines(found: Finding) -> Iterator[str]:
    """Yield what is printed."""
    for name, count in found.counts.items():
        yield f"{name:24}{count:>14,}"
    for ranks, count in found.world_sizes.items():
        yield f"{f'saves on {ranks} ranks':24}{count:>14,}"
    yield f"{'kept at the end':24}{found.kept:>14,}"
    yield f"{'lost':24}{len(found.lost):>14,}"
    first, last = found.memory[0], found.memory[-1]
    yield (
        f"memory after {first[0]:,} saves {first[1]:.1f} MiB, after {last[0]:,} {last[1]:.1f} MiB: "
        f"{found.memory_slope:+.2f} kB a save"
    )
    yield f"open files {found.open_files[0]} to {found.open_files[1]}"
    yield f"{found.seconds:.0f} s on {found.machine['cores']} cores of {found.machine['processor']}"
    yield from found.lost


if __name__ == "__main__":
    sys.exit(main())
