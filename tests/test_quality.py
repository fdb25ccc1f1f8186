"""The benchmark of what resuming loses: its ruler, its bookkeeping, and a grid in small."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.curve import Curve, interval
from benchmarks.quality.grid import Cells
from benchmarks.quality.outcome import Measured, table
from benchmarks.quality.plans import FORMS, SHORT
from benchmarks.quality.rows import ROWS
from benchmarks.quality.task import Size, Training

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "resume_quality.json"


@given(
    step=st.integers(300, 900),
    behind=st.floats(0, 200),
    slow=st.floats(200, 2000),
    noise=st.floats(0, 0.0005),
    seed=st.integers(0, 99),
)
def test_a_run_that_is_some_steps_behind_is_found_there(step, behind, slow, noise, seed):
    """On curves of a known form, whose evaluations are off at random."""

    def true(at: float) -> float:
        return 1 + math.exp(-at / slow)

    draw = np.random.default_rng(seed)
    curve = Curve({at: true(at) + draw.normal(0, noise) for at in range(25, 1201, 25)}, width=125)
    gap = true(step - behind) - true(step)
    slope = math.exp(-step / slow) / slow
    assert abs(curve.lost(step, gap, 125) - behind) <= 0.3 * behind + 1 + 4 * noise / slope


@given(gap=st.floats(-0.5, 2), step=st.integers(25, 1200))
def test_more_is_never_less(gap, step):
    """A larger gap is never fewer lost steps, also beyond the curve's ends; no gap is none."""
    curve = Curve({at: 1 + 100 / at for at in range(25, 1201, 25)}, width=125)
    assert curve.lost(step, 0.0, 125) == 0
    assert curve.lost(step, gap + 0.01, 125) >= curve.lost(step, gap, 125)


def test_the_interval_of_a_mean():
    low, high = interval([1.0] * 10)
    assert low == high == 1.0
    low, high = interval([0.0, 1.0] * 50)
    assert 0.35 < low < 0.5 < high < 0.65


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two regimes of a model that is as small as can be, two failure points each, one seed."""
    size = Size(width=32, layers=2, head=16, rows=2, length=32)
    regimes = tuple(replace(r, steps=24, interval=4, points=(8, 20), warm_up=4) for r in SHORT.regimes)
    plan = replace(SHORT, regimes=regimes, further=2, every=4, tokens=512, size=size)
    names = ("full", "moments:every=5,weights=bf16,moments=bf16", "first moment never and 0")
    rows = [row for row in ROWS if row.name.startswith(names)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("grid")
    for regime in regimes:
        list(Cells(plan, regime, 1, work).measure(rows))
    torch.set_num_threads(threads)
    return plan, rows, work


def test_a_full_checkpoint_loses_nothing_bit_for_bit(grid):
    """The ruler's zero: the same texts, the same evaluation, the same numbers."""
    plan, rows, work = grid
    found = {told["policy"]: told for told in table(plan, rows, (), (1,), work)["policies"]}
    assert found["full"]["lost_steps"] == found["full"]["gap"] == found["full"]["noise"] == 0
    assert found["full"]["cells"] == 4
    assert found["full"]["bytes"] == 1
    assert any(told.get("gap") for told in found.values())
    assert found["full, every 3 saves"]["lost_intervals"] == 1
    assert 0.18 < found["moments:every=5,weights=bf16,moments=bf16"]["bytes"] < 0.3


def test_what_is_measured_is_not_measured_again(grid):
    plan, rows, work = grid
    assert list(Cells(plan, plan.regimes[0], 1, work).measure(rows)) == []


def test_the_calibration(grid):
    plan, _, work = grid
    measured = Measured(plan, plan.regimes[0], 1, work)
    assert measured.behind(20, 4) == pytest.approx(4, abs=0.5)


def test_training_repeats_itself():
    """Another process that starts at the same seed and reads the same texts gets the same bits."""
    size = Size(width=32, layers=1, head=16, rows=2, length=32)
    runs = [Training(replace(SHORT.regimes[0], steps=5, warm_up=1), 3, size) for _ in range(2)]
    for run in runs:
        list(run.run(0, 3))
    states = [run.state()["model"] for run in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_kept_results_are_those_of_the_long_form():
    """What the documentation shows was measured by this benchmark: its rows, seeds apart from those chosen on."""
    kept = json.loads(RESULTS.read_text())
    assert {row.name for row in FORMS["long"].rows} <= {told["policy"] for told in kept["policies"]}
    assert not {*kept["setup"]["seeds_chosen_on"]} & {*kept["setup"]["seeds_reported"]}
    assert all(
        {"policy", "bytes", "lost_steps", "lost_intervals", "spread"} <= told.keys() for told in kept["policies"]
    )
