"""Depth up-scaling: a trained model of 8 layers becomes one of 12, moments included, and trains on.

    python examples/depth_upscaling.py

The recipe repeats layers 2 to 5 under other names, as one repeats layers of a Llama to make SOLAR (arXiv:2312.15166).
No tensor is read or written: the new checkpoint's `.metadata` names the same bytes twice, and the optimizer's list of
parameters follows. The deeper model starts far below the loss of a new one, and its AdamW goes on with warm moments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tiny_training import Training, fresh

from tailor_dcp import merge

# Layers 0 to 5, then 2 to 7: the left sides are the old model's layers, the right sides the new one's.
RECIPE = """\
base: {checkpoint}
rename:
  model.layers.2: [model.layers.2, model.layers.6]
  model.layers.3: [model.layers.3, model.layers.7]
  model.layers.4: [model.layers.4, model.layers.8]
  model.layers.5: [model.layers.5, model.layers.9]
  model.layers.6: model.layers.10
  model.layers.7: model.layers.11
"""


def main(
    run: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("depth-upscaling-run"),
    steps: Annotated[int, typer.Option(min=2, help="Training steps; half of them with 8 layers.")] = 120,
) -> None:
    """Train, repeat layers, train on, compare."""
    fresh(run)
    half = steps // 2
    small = Training()
    small.train(half, run, every=half)

    recipe = run / "deeper.yaml"
    recipe.write_text(RECIPE.format(checkpoint=run / f"step-{half}"))
    merged = merge(recipe, run / "deeper")  # the command: tailor merge deeper.yaml deeper
    print(f"merged in {merged.seconds:.2f} s: {merged.live:,} bytes of tensors, {merged.written:,} bytes written")

    deeper = Training(layers=12, resume=run / "deeper")
    new = Training(layers=12)
    print(f"\nheld-out loss                     step {half}   step {steps}")
    print(f"8 layers                        {small.loss():>9.4f} {small.train(steps):>9.4f}")
    print(f"12 layers, made of them         {deeper.loss():>9.4f} {deeper.train(steps):>9.4f}")
    print(f"12 layers, new at step {half:<8} {new.loss():>9.4f} {new.train(steps - half):>9.4f}")


if __name__ == "__main__":
    typer.run(main)
