"""Converting a ZeRO-3 checkpoint: beside DeepSpeed's own converters and beside ``cp -r``.

    python -m benchmarks.convert [--pairs 5] [--place /dev/shm] [--json FILE]

Each piece of work runs in a process of its own, which has imported what it needs before the clock starts.
``zero_to_fp32`` writes the weights alone, ``ds_to_universal`` and ours everything. Private memory is anonymous
memory beyond what the imports left, sampled while the work runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.harness import disk_bytes, llama_shapes, ratio, scratch
from benchmarks.table import publish, row

SMALL = llama_shapes(layers=12, hidden=640, vocab=24576)  # 110 M parameters: 1.3 GB of fp32 weights and moments
LARGE = llama_shapes(layers=28, hidden=640, vocab=24576)  # twice as many
OURS = "to dcp"
WORKS = ("cp -r", OURS, "zero_to_fp32", "ds_to_universal")
BARS = {"cp -r": 2.0, "zero_to_fp32": 1.0, "ds_to_universal": 1 / 3}
"""What our time may be, as a multiple of theirs."""
_MEBI = 1 << 20


def main(
    pairs: Annotated[int, typer.Option(help="Interleaved pairs.")] = 5,
    place: Annotated[Path, typer.Option(help="Where to convert.")] = Path("/dev/shm"),
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
    make: Annotated[Path | None, typer.Option(hidden=True)] = None,
    large: Annotated[bool, typer.Option(hidden=True)] = False,
    work: Annotated[str | None, typer.Option(hidden=True)] = None,
    watch: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure all of them; exit with 1 if a bar is missed."""
    if make:
        _make(make, LARGE if large else SMALL)
    elif work:
        print(_measured(work, place, out or Path("out"), watch))
    else:
        _compare(pairs, place, out)


def _compare(pairs: int, place: Path, out: Path | None) -> None:
    with scratch(str(place)) as folder:
        sizes = {name: _checkpoint(folder / name, name == "large") for name in ("small", "large")}
        found = [_round(folder, turn) for turn in range(-1, pairs)][1:]
        # Sampling memory takes time from the work, so that is done apart.
        peaks = {name: _once(name, folder / "small", folder / "out", watch=True) for name in WORKS}
        memory = {name: _once(OURS, folder / name, folder / "out", watch=True) for name in sizes}
    times = {name: [row[name] for row in found] for name in WORKS}
    note = {n: f"{median(times[n]):.2f} s, {peaks[n] / _MEBI:.0f} MiB private" for n in WORKS}
    rows = [
        row(OURS, name, "time", ratio(times[OURS], times[name]), bar, note=f"its {note[name]}")
        for name, bar in BARS.items()
    ]
    for name, held in memory.items():
        size = f"{sizes[name] / 1e9:.2f} GB"
        rows.append(row(f"{OURS}, {size}", "600 MiB", "private memory", held / (600 * _MEBI), 1.0))
    publish(f"Converting ZeRO-3, 2 ranks, {sizes['small'] / 1e9:.2f} GB, {pairs} pairs", rows, out, bytes=sizes)


def _round(folder: Path, turn: int) -> dict[str, float]:
    """Do each piece of work once, in an order that is turned round from round to round."""
    done = {}
    for name in WORKS if turn % 2 else reversed(WORKS):
        done[name] = _once(name, folder / "small", folder / "out")
    return done


def _once(work: str, source: Path, target: Path, watch: bool = False) -> float:
    """Return the seconds that a piece of work took, or the bytes of memory if that is watched."""
    told = _child(work, source, target, watch)
    shutil.rmtree(target)
    return told


def _child(work: str, source: Path, target: Path, watch: bool) -> float:
    words = [sys.executable, "-m", "benchmarks.convert", "--work", work, "--place", str(source), "--json", str(target)]
    words += ["--watch"] if watch else []
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{work} failed: {done.stderr[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def _measured(work: str, source: Path, target: Path, watch: bool) -> float:
    run = _prepared(work, source, target)
    watching = _Watch() if watch else None
    start = time.perf_counter()
    run()
    return watching.stop() if watching else time.perf_counter() - start


def _prepared(work: str, source: Path, target: Path) -> Any:
    """Import what a piece of work needs, and return it."""
    if work == "cp -r":
        return lambda: subprocess.run(["cp", "-r", source, target], check=True)
    if work == OURS:
        from tailor_dcp.converters import convert, dcp_source, dcp_target, zero_source  # noqa: F401

        return lambda: convert(source, target, "dcp")
    if work == "zero_to_fp32":
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        return lambda: convert_zero_checkpoint_to_fp32_state_dict(str(source), str(target), safe_serialization=True)
    from deepspeed.checkpoint import ds_to_universal

    arguments = ds_to_universal.argparse.Namespace(
        input_folder=str(next(source.glob("global_step*"))), output_folder=str(target), num_extract_workers=2,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    return lambda: ds_to_universal.main(arguments)


class _Watch:
    """Samples this process's anonymous memory, and its children's."""

    def __init__(self) -> None:
        self._before, self._peak, self._going = _anonymous(), 0, True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._going:
            self._peak = max(self._peak, _anonymous())
            time.sleep(0.005)

    def stop(self) -> int:
        """Return the most bytes that were held beyond those at the start."""
        self._going = False
        self._thread.join()
        return max(0, self._peak - self._before)


def _anonymous() -> int:
    mine = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    held = 0
    for pid in (str(os.getpid()), *Path(mine).read_text().split()):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        held += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
    return held


def _checkpoint(folder: Path, large: bool) -> int:
    """Have two real DeepSpeed engines save a checkpoint, and return its bytes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launcher, "-m", "benchmarks.convert", "--make", str(folder), *(["--large"] if large else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if not (folder / "latest").exists():
        raise RuntimeError(done.stderr[-2000:])
    return disk_bytes(folder)


def _make(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import deepspeed
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = torch.nn.ParameterDict({n.replace(".", "_"): torch.randn(s) * 0.02 for n, s in shapes.items()})

        def forward(self) -> torch.Tensor:
            return torch.stack([p.float().square().mean() for p in self.held.values()]).sum()

    config = {
        "train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    deepspeed.init_distributed("gloo")
    net = Net()
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters()), config=config)
    engine.backward(engine())
    engine.step()
    engine.save_checkpoint(str(folder))


if __name__ == "__main__":
    typer.run(main)
