"""Average the last five checkpoints of a run with mergekit's linear method, moments as well, and train on.

    python examples/average_checkpoints.py

The plan is mergekit's, but its models are DCP checkpoints, and one key is ours: ``optimizer: average`` averages AdamW's
moments like the weights (``drop`` would leave them out). With a constant learning rate an average of the last
checkpoints is often better than each of them, as the noise of single steps cancels out (arXiv:2306.03241).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tiny_training import Training, fresh

from tailor_dcp import merge

HEAD = """\
merge_method: linear
optimizer: average
models:
"""
MODEL = """\
  - model: {checkpoint}
    parameters: {{weight: 1}}
"""


def main(
    run: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("average-run"),
    steps: Annotated[int, typer.Option(min=5, help="Training steps until the average.")] = 150,
    every: Annotated[int, typer.Option(min=1, help="Steps from one checkpoint to the next.")] = 5,
) -> None:
    """Train, average, resume, compare."""
    if steps % every or steps < 5 * every:
        raise typer.BadParameter(f"--steps must be a multiple of --every, and at least {5 * every}")
    fresh(run)
    print(f"A small Llama learns until step {steps} and saves every {every} steps.")
    Training().train(steps, run, every)
    last = [run / f"step-{step}" for step in range(steps - 4 * every, steps + 1, every)]

    plan = run / "average.yaml"
    # The newest comes first, as the first model's step and param groups are those of the result.
    plan.write_text(HEAD + "".join(MODEL.format(checkpoint=checkpoint) for checkpoint in reversed(last)))
    merge(plan, run / "average")  # the command: tailor merge average.yaml average

    print(f"\nheld-out loss    now   {every} steps later")
    for checkpoint in (*last, run / "average"):
        training = Training(resume=checkpoint)
        print(
            f"{checkpoint.name:<12} {training.loss():>8.4f} {training.train(training.progress['step'] + every):>8.4f}"
        )


if __name__ == "__main__":
    typer.run(main)
