"""Lost steps: how far behind the uninterrupted run a resumed one is, read off the uninterrupted run's loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Curve:
    """A run's evaluation loss over its steps, smoothed.

    Each evaluation is off by the chance of the last few batches, which a resumed run shares, for it
    reads the same ones. So it is the *gap* between the two runs at the same step that is measured, and
    the smooth curve only turns it into steps: it says how many steps earlier the uninterrupted run was
    that much worse.

    Args:
        losses: evaluation loss by step.
        width: half the width, in steps, of the window in which a straight line is fitted.
    """

    def __init__(self, losses: Mapping[int, float], width: float) -> None:
        steps = np.array(sorted(losses), np.float64)
        values = np.array([losses[int(step)] for step in steps], np.float64)
        self.steps = np.arange(steps[0], steps[-1] + 1)
        fitted = _fitted(steps, values, self.steps, width)
        # Further training never counts as a loss; a running minimum makes the curve one that can be inverted.
        self.values = np.minimum.accumulate(fitted)

    def at(self, step: float) -> float:
        """Return the smooth curve's value."""
        return float(np.interp(step, self.steps, self.values))

    def slope(self, step: float, reach: float) -> float:
        """Return by how much the loss falls a step, around ``step``."""
        low, high = max(self.steps[0], step - reach), min(self.steps[-1], step + reach)
        return float((self.at(low) - self.at(high)) / (high - low))

    def lost(self, step: int, gap: float, reach: float) -> float:
        """Return how many steps a run is behind that is worse by ``gap`` at ``step``; negative if it is ahead.

        Args:
            step: where the two were compared.
            gap: the resumed run's loss less the uninterrupted one's.
            reach: steps around an end of the curve whose slope it is taken to go on with.
        """
        if gap == 0:
            return 0.0
        target = self.at(step) + gap
        if target > self.values[0]:
            return float(step - self.steps[0] + (target - self.values[0]) / self.slope(self.steps[0], reach))
        if target < self.values[-1]:
            ahead = (self.values[-1] - target) / max(self.slope(self.steps[-1], reach), 1e-12)
            return float(step - self.steps[-1] - ahead)
        # np.interp wants rising abscissae; of a flat stretch the step nearest to the comparison counts.
        return step - _nearest(self.values, self.steps, target, step)


def _nearest(values: Array, steps: Array, target: float, step: float) -> float:
    above = np.flatnonzero(values >= target)
    last = int(above[-1])
    if values[last] == target or last + 1 == len(values):
        flat = steps[values == values[last]]
        return float(flat[np.argmin(np.abs(flat - step))])
    part = (values[last] - target) / (values[last] - values[last + 1])
    return float(steps[last] + part)


def _fitted(steps: Array, values: Array, at: Array, width: float) -> Array:
    """Return the values at some steps of straight lines fitted to what lies near (tricube weights, as in LOESS)."""
    near = steps[None, :] - at[:, None]
    away = np.abs(near)
    widths = np.maximum(width, np.sort(away, axis=1)[:, min(4, len(steps) - 1)] * 1.01)[:, None]
    weights = np.clip(1 - (away / widths) ** 3, 0, None) ** 3
    total, first, second = weights.sum(1), (weights * near).sum(1), (weights * near**2).sum(1)
    mean, slope = weights @ values, (weights * near) @ values
    fitted: Array = (second * mean - first * slope) / (total * second - first**2)
    return fitted


def interval(values: Sequence[float], rounds: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    draw = np.random.default_rng(0)
    array = np.array(values, np.float64)
    means = np.sort(draw.choice(array, (rounds, len(array))).mean(1))
    return float(means[round(0.025 * rounds)]), float(means[round(0.975 * rounds) - 1])
