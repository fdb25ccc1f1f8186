"""A plan of LLMTailor taken over unchanged: ``plan.yaml`` merges a ZeRO-3 run, and DeepSpeed goes on from the result.

    python examples/llmtailor_plan/run.py

Two ranks train in ZeRO-3 and save at two steps (``zero_run.py``, which is DeepSpeed alone). One command merges:

    tailor merge plan.yaml merged --to zero3

The same engine loads the result with ``load_checkpoint`` and trains on, beside one that loads the later checkpoint.
The plan's paths are those of the run's folder, so the command runs there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from tiny_training import fresh  # noqa: E402 - it lies among the other examples

LAST = 12  # the later of the two steps that plan.yaml names


def main(
    run: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("llmtailor-run"),
    further: Annotated[int, typer.Option(min=1, help="Steps after the merge.")] = 4,
) -> None:
    """Train, merge, resume, compare."""
    fresh(run)
    shutil.copy(HERE / "plan.yaml", run)
    print(f"Two ranks of ZeRO-3 train {LAST} steps and save at 8 and {LAST}.", flush=True)
    train(run, "--steps", LAST, "--save", 8, "--save", LAST)

    command = ["tailor", "merge", "plan.yaml", "merged", "--to", "zero3"]
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("tailor")), *command[1:]], cwd=run, check=True)

    end = LAST + further
    full = train(run, "--steps", end, "--resume", f"checkpoint-{LAST}")
    merged = train(run, "--steps", end, "--resume", "merged")
    print(f"\nstep   from checkpoint-{LAST}   from merged")
    for step, loss in full.items():
        print(f"{step:>4} {loss:>20.4f} {merged[step]:>13.4f}")


def train(run: Path, *options: object) -> dict[int, float]:
    """Run the training script on two ranks, in the run's folder; return the loss of each step."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(HERE.resolve() / "zero_run.py"), ".", *map(str, options)],
        cwd=run,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the training failed: {done.stderr[-2000:]}")
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\S+)", done.stdout)}


if __name__ == "__main__":
    typer.run(main)
