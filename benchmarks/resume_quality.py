"""What a resumed run loses, policy by policy, at what share of a full save's bytes.

    python -m benchmarks.resume_quality [--form long] [--jobs 2] [--work FOLDER] [--json FILE]

A small Llama reads real text in two regimes, pre-training and fine-tuning. One uninterrupted run per seed and regime is
saved by every policy at each interval; it fails at several steps, is resumed by plain ``dcp.load`` from each policy's
checkpoint and goes on with the same texts. What it lost is read off the uninterrupted run's loss curve, K steps later.
``docs/policies.md`` says what came out, and what to make of it.

Everything that is measured stays in ``--work``, so a long run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine
from benchmarks.quality.grid import Cells, Plan
from benchmarks.quality.outcome import table
from benchmarks.quality.plans import FORMS
from benchmarks.quality.task import one_thread

RESULTS = Path(__file__).parent / "results" / "resume_quality.json"


def main(
    form: Annotated[str, typer.Option(help=f"One of {', '.join(FORMS)}.")] = "short",
    jobs: Annotated[int, typer.Option(help="Processes, one core each.")] = 2,
    work: Annotated[Path | None, typer.Option(help="Where the grid is kept; a temporary folder by default.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
    part: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure the grid that is missing, and show what it tells."""
    if form not in FORMS:
        raise typer.BadParameter(f"there is no form {form}; there are {', '.join(FORMS)}.")
    warnings.simplefilter("ignore")  # torch's, about saving without a process group
    if part:
        assert work is not None
        _measure(form, [int(seed) for seed in part.split(",")], work)
        return
    console = Console(width=160)
    with tempfile.TemporaryDirectory(prefix="tailor-quality-") as scratch:
        place = work or Path(scratch)
        began = time.perf_counter()
        _spread(form, jobs, place)
        chosen = FORMS[form]
        found = table(chosen.plan, chosen.rows, chosen.chosen, chosen.reported, place)
    found |= {"form": form, "seconds": round(time.perf_counter() - began), "machine": machine()}
    console.print(shown(found, chosen.plan))
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


def _spread(form: str, jobs: int, work: Path) -> None:
    """Deal the seeds to processes, one core each, and wait for all."""
    seeds = [*FORMS[form].chosen, *FORMS[form].reported]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.resume_quality", "--form", form, "--work", str(work), "--part"]
    parts = [",".join(map(str, seeds[job::jobs])) for job in range(min(jobs, len(seeds)))]
    processes = [subprocess.Popen([*command, part], env=environment) for part in parts]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("A part of the grid could not be measured; what it said is above.")


def _measure(form: str, seeds: list[int], work: Path) -> None:
    chosen = FORMS[form]
    with one_thread():
        for seed, regime in product(seeds, chosen.plan.regimes):
            for line in Cells(chosen.plan, regime, seed, work).measure(chosen.rows):
                sys.stderr.write(f"seed {seed}, {regime.name}: {line}\n")


def shown(found: dict[str, Any], plan: Plan) -> Table:
    """Return the outcome as a table."""
    title = "Intervals lost by resuming, over seeds, failure points and regimes"
    columns = Table(title=title, title_justify="left")
    for column in (
        "policy",
        "bytes",
        "disk",
        "lost  [95 %]",
        "worst",
        *(regime.name for regime in plan.regimes),
        "note",
    ):
        columns.add_column(column)
    for told in found["policies"]:
        spread = f"  [{told['low']:+.2f}, {told['high']:+.2f}]" if "low" in told else ""
        columns.add_row(
            told["policy"],
            f"{told['bytes']:.3f}",
            f"{told['disk']:.2f}",
            f"{told['lost_intervals']:+.3f}{spread}",
            f"{told['worst_intervals']:+.2f}" if "worst_intervals" in told else "",
            *(f"{told['regimes'][regime.name]['lost_intervals']:+.3f}" for regime in plan.regimes),
            told["note"],
        )
    return columns


if __name__ == "__main__":
    typer.run(main)
