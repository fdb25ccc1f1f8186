"""What moved far since it was last saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from tailor_dcp.policies.base import Measure, Policy, SaveRequest, UnitInfo
from tailor_dcp.policies.options import Amount, DtypeName, Period, Positive, check_options, narrowed
from tailor_dcp.units import Unit


@dataclass(frozen=True)
class Drift(Policy):
    """Units whose relative change since their own last save exceeds a threshold, and those that get too old.

    The change is |w - w_saved| / |w_saved| over all of a unit's tensors. What is not known, as in the first
    save after one of another policy, counts as far. After any save no unit is more than ``max_stale`` saves old.

    Attributes:
        threshold: the relative change from which on a unit is due.
        states: the same for the optimizer's state, which moves much faster than weights; None for ``threshold``.
        max_stale: how many saves old a unit may at most be after any save.
        half_life: saves in which the thresholds fall to a half, as the steps of a decaying learning rate do; 0
            leaves them as they are.
        exact: keep a copy of the state as it was saved, on the device where it is, instead of estimating the change
            from one element in some thousands. A process that was just started estimates until it has saved.
        weights: the dtype that weights are stored in if theirs is wider, as in `Moments`.
        moments: the same for the optimizer's state.
    """

    name: ClassVar[str] = "drift"

    threshold: Positive = 0.02
    states: Positive | None = None
    max_stale: Period = 5
    half_life: Amount = 0
    exact: bool = False
    weights: DtypeName = "fp32"
    moments: DtypeName = "fp32"

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def needs_drift(self) -> Measure:
        """``exact`` or ``sketch``."""
        return "exact" if self.exact else "sketch"

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return what moved too far, and what would become too old."""
        decay = 0.5 ** (request.index / self.half_life) if self.half_life else 1.0
        return [info.unit for info in request.units if self._is_due(info, decay)]

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label each unit on its own: nothing else is always due with it."""
        return {info.unit: str(info.unit) for info in request.units}

    def storage_dtype(self, unit: Unit, dtype: torch.dtype) -> torch.dtype:
        """Return the narrower of a tensor's own dtype and the one chosen for its kind."""
        return narrowed(unit, dtype, self.weights, self.moments)

    def _is_due(self, info: UnitInfo, decay: float) -> bool:
        limit = self.threshold if info.is_weight or self.states is None else self.states
        return info.age is None or info.age > self.max_stale or info.drift is None or info.drift > limit * decay
