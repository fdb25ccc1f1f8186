"""Draws docs/idea.png: which bytes of each checkpoint were written by which save.

    python docs/idea.py

Nothing in the picture is made up: a small run is saved with the policy and inspected.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed.checkpoint as dcp
from matplotlib.axes import Axes

from tailor_dcp import LayerwisePlanner, inspect

POLICY = "moments:every=3"
STEPS = range(100, 700, 100)
LAYERS = ("embed_tokens", "layers.0", "layers.1", "layers.2", "lm_head")
COLORS = ("#1b4f72", "#1f7a5c", "#b9770e", "#943126", "#6c3483", "#34495e")


def main() -> None:
    """Save, inspect, draw."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as run:
        origins = [_origins(Path(run), step) for step in STEPS]
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure, axes = plt.subplots(1, len(STEPS), figsize=(11, 4.2), sharey=True)
        for step, axis, found in zip(STEPS, axes, origins, strict=True):
            _draw(axis, step, found)
        axes[0].set_yticks(range(len(LAYERS)), LAYERS, fontfamily="monospace", fontsize=9)
        figure.suptitle(
            "Every folder is a complete checkpoint that plain dcp.load reads. Solid: written by this save. "
            "Pale: bytes of an earlier step, linked.",
            fontsize=10,
        )
        figure.tight_layout()
        figure.savefig(Path(__file__).with_name("idea.png"), dpi=110)


def _origins(run: Path, step: int) -> dict[tuple[str, str], int]:
    """Save one step and return where each layer's weights and moments come from."""
    weights = {f"{name}.weight": torch.full((64, 64), float(step)) for name in LAYERS}
    moments = {name: {"exp_avg": torch.zeros(64, 64), "exp_avg_sq": torch.zeros(64, 64)} for name in weights}
    state = {"model": weights, "optim": {"state": moments}}
    dcp.save(state, checkpoint_id=run / f"step-{step}", planner=LayerwisePlanner(POLICY))
    return {(u.layer, u.kind): u.origin_step or 0 for u in inspect(run / f"step-{step}").units}


def _draw(axis: Axes, step: int, origins: dict[tuple[str, str], int]) -> None:
    for row, layer in enumerate(LAYERS):
        for column, kind in enumerate(("weight", "exp_avg")):
            origin = origins[layer, kind]
            color, own = COLORS[origin // 100 - 1], origin == step
            box = plt.Rectangle(
                (column - 0.46, row - 0.42), 0.92, 0.84, facecolor=color, alpha=1.0 if own else 0.22, linewidth=0
            )
            axis.add_patch(box)
            axis.text(
                column, row, str(origin), ha="center", va="center", fontsize=9,
                color="white" if own else "#222222", fontweight="bold" if own else "normal",
            )  # fmt: skip
    axis.set(xlim=(-0.6, 1.6), ylim=(len(LAYERS) - 0.4, -0.6))
    axis.set_title(f"step-{step}", fontsize=10, fontfamily="monospace", color=COLORS[step // 100 - 1])
    axis.set_xticks((0, 1), ("weights", "moments"), fontsize=8)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_color("#cccccc")


if __name__ == "__main__":
    main()
