"""The two forms of the grid, and the one for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.quality.grid import Plan
from benchmarks.quality.rows import EXPLORED, ROWS, Row
from benchmarks.quality.task import LARGE, Regime

PRE_TRAINING = Regime(
    name="pre-training",
    steps=1200,
    interval=50,
    points=(100, 600, 1150),
    peak=2e-3,
    warm_up=60,
    final=0.1,
    betas=(0.9, 0.95),
    decay=0.1,
)
FINE_TUNING = Regime(
    name="fine-tuning",
    steps=600,
    interval=50,
    points=(100, 250, 450),
    peak=2e-4,
    warm_up=20,
    final=0.1,
    betas=(0.9, 0.999),
    decay=0.01,
    tuned=True,
)
LONG = Plan((PRE_TRAINING, FINE_TUNING), further=25, every=25, tokens=16_384)
SHORT = Plan(
    (
        replace(PRE_TRAINING, steps=300, interval=25, points=(50, 150, 275), warm_up=30),
        replace(FINE_TUNING, steps=200, interval=25, points=(50, 125, 175), warm_up=10),
    ),
    further=20,
    every=25,
    tokens=8_192,
)
# One regime, one seed: the winner and its nearest rivals at 100 million parameters.
GPU = replace(LONG, size=LARGE, device="cuda", tokens=262_144)


@dataclass(frozen=True)
class Form:
    """A grid and the policies in it.

    Attributes:
        plan: the regimes.
        rows: the policies.
        chosen: seeds that policies may be chosen by.
        reported: seeds that the table is of.
    """

    plan: Plan
    rows: Sequence[Row]
    chosen: Sequence[int]
    reported: Sequence[int]


_RIVALS = ("full", "parity", "filter", "random", "moments:every=5", "moments:every=10", "budget", "layers by drift")
FORMS = {
    "short": Form(SHORT, [row for row in ROWS if row.name.startswith(_RIVALS)], (), (1, 2, 3)),
    "long": Form(LONG, ROWS, (0,), (1, 2, 3)),
    "wide": Form(LONG, [*ROWS, *EXPLORED], (0,), (1, 2, 3)),
    "gpu": Form(GPU, [row for row in ROWS if row.name.startswith(_RIVALS)], (), (1,)),
}
