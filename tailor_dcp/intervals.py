"""Intervals: how often to save, what failures cost, and what that costs in money. Pure arithmetic.

Times are in seconds. The mean time between failures is that of the whole job: a failure of any machine stops it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_HOURS_A_YEAR = 8760
_MONTHS_A_YEAR = 12


def young(save: float, mtbf: float) -> float:
    """Return the training time between saves that loses least, to first order.

    Source: J. W. Young, *A first order approximation to the optimum checkpoint interval*, CACM 17 (1974).

    Args:
        save: how long training stands still for a save.
        mtbf: mean time between failures.
    """
    return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """Return the training time between saves that loses least, to a higher order.

    Source: J. T. Daly, *A higher order estimate of the optimum checkpoint interval for restart dumps*, Future
    Generation Computer Systems 22 (2006), equation 37.
    """
    if save >= 2 * mtbf:
        return mtbf
    part = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - save


def wasted(interval: float, save: float, mtbf: float, restart: float = 0.0, lost_intervals: float = 0.0) -> float:
    """Return the share of all time that is spent on saving, on training what was lost, and on restarting.

    A failure strikes at any moment alike, so it loses half an interval on average.

    Args:
        interval: training time between two saves.
        save: how long training stands still for one.
        mtbf: mean time between failures.
        restart: how long it takes to be training again after a failure.
        lost_intervals: intervals by which a run that resumes from such a checkpoint lags behind one that resumes from
            a full one.
    """
    saving = save / (interval + save)
    failing = (interval / 2 + save / 2 + restart + lost_intervals * interval) / mtbf
    return min(1.0, saving + (1 - saving) * failing)


@dataclass(frozen=True)
class Prices:
    """What time and storage cost.

    Attributes:
        gpus: accelerators that the job holds.
        gpu_hour: price of one for an hour.
        gb_month: price of a gigabyte (10⁹ bytes) stored for a month.
    """

    gpus: int
    gpu_hour: float = 0.0
    gb_month: float = 0.0

    def yearly(self, waste: float, disk: float) -> float:
        """Return what a year of wasted time and of stored bytes costs.

        Args:
            waste: the share of time that is wasted.
            disk: bytes in store.
        """
        time = waste * self.gpus * self.gpu_hour * _HOURS_A_YEAR
        return time + disk / 1e9 * self.gb_month * _MONTHS_A_YEAR
