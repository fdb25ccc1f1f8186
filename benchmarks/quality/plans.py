"""The two forms of the grid, and those of a model of 107 million parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.quality.grid import Plan
from benchmarks.quality.rows import EXPLORED, RESTING_ROWS, ROWS, Row
from benchmarks.quality.task import LARGE, LARGE_BATCH, Regime

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
# Most of the model rests: where drift and unchanged are at home.
RESTING = replace(
    LONG, regimes=(replace(PRE_TRAINING, name="most layers rest", steps=600, points=(300, 450, 600), rests=200),)
)
# One seed: the winner and its nearest rivals at 107 million parameters, for one core and for a GPU.
LARGE_RATE = 6e-4  # what trains the small model well is too much for a wide one
LARGE_PLAN = Plan(
    (
        replace(PRE_TRAINING, steps=200, interval=25, points=(50, 125, 200), peak=LARGE_RATE, warm_up=20),
        replace(FINE_TUNING, steps=100, interval=25, points=(75, 100), peak=LARGE_RATE / 10, warm_up=10),
    ),
    further=20,
    every=10,
    tokens=4_096,
    size=LARGE,
)
GPU = Plan(
    (replace(PRE_TRAINING, peak=LARGE_RATE), replace(FINE_TUNING, peak=LARGE_RATE / 10)),
    further=25,
    every=25,
    tokens=262_144,
    size=LARGE_BATCH,
    device="cuda",
)


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


_BF16 = "weights=bf16,moments=bf16"
_NEAREST = (
    f"moments:every=5,{_BF16}",
    f"moments:every=10,{_BF16}",
    f"budget:fraction=0.25,max_stale=8,first=weights,{_BF16}",
    "parity",
    f"moments:every=1,{_BF16}",
)
_RIVALS = ("full", "parity", "filter", "random", "moments:every=5", "moments:every=10", "budget", "layers by drift")
FORMS = {
    "short": Form(SHORT, [row for row in ROWS if row.name.startswith(_RIVALS)], (), (1, 2, 3)),
    "long": Form(LONG, ROWS, (0,), (1, 2, 3)),
    "wide": Form(LONG, [*ROWS, *EXPLORED], (0,), (1, 2, 3)),
    "resting": Form(RESTING, RESTING_ROWS, (), (1, 2, 3)),
    "large": Form(LARGE_PLAN, [row for row in ROWS if row.name in _NEAREST], (), (1,)),
    "gpu": Form(GPU, [row for row in ROWS if row.name.startswith(_RIVALS)], (), (1,)),
}
