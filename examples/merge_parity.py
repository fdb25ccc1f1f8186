"""Merge a run by parity, and resume: every other layer from the checkpoint before the last.

    python examples/merge_parity.py

A training saves at two steps. A recipe takes the odd layers, weights and moments, from the earlier one and everything
else from the later one. The merge reads no tensor and writes none: the new checkpoint's files are links. Training goes
on from it, beside the same training that goes on from the full checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tiny_training import Training, fresh

from tailor_dcp import inspect, merge

RECIPE = """\
base: {run}@{last}
layers:
  "model.layers.*[13579]": {run}@{before}
max_stale_steps: {apart}
"""


def main(
    run: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("merge-parity-run"),
    steps: Annotated[int, typer.Option(min=3, help="Training steps; a third before each checkpoint.")] = 150,
) -> None:
    """Train, merge, resume, compare."""
    fresh(run)
    before, last = steps // 3, steps // 3 * 2
    print(f"A small Llama of 8 layers learns until step {last}; it saves at steps {before} and {last}.")
    Training().train(last, run, every=before)

    recipe = run / "parity.yaml"
    recipe.write_text(RECIPE.format(run=run, last=last, before=before, apart=last - before))
    merged = merge(recipe, run / "merged")  # the command: tailor merge parity.yaml merged
    print(f"merged in {merged.seconds:.2f} s: {merged.live:,} bytes of tensors, {merged.written:,} bytes written")
    for unit in inspect(run / "merged").units:
        if unit.kind == "weight":
            print(f"  {unit.layer:<20} step {unit.origin_step}")

    print(f"\nheld-out loss            step {last}   step {steps}")
    for name, checkpoint in (("the full checkpoint", run / f"step-{last}"), ("merged by parity", run / "merged")):
        training = Training(resume=checkpoint)
        print(f"{name:<22} {training.loss():>9.4f} {training.train(steps):>9.4f}")


if __name__ == "__main__":
    typer.run(main)
