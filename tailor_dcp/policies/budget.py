"""As much as fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies.base import Measure, Policy, SaveRequest, UnitInfo
from tailor_dcp.policies.options import DtypeName, Period, Positive, Share, check_options, narrowed
from tailor_dcp.units import Unit


@dataclass(frozen=True)
class Budget(Policy):
    """The units with most drift per byte that fit into a budget, and those that would get too old.

    After any save no unit is more than ``max_stale`` saves old. That bound comes before the budget: a save may
    exceed it, so units are written early, the oldest first, where their turns would otherwise fall into one save.

    Attributes:
        fraction: the budget as a share of all units' bytes in the training state's own dtypes.
        bytes: the budget in bytes; one of ``fraction``, ``bytes`` and ``seconds`` must be given.
        seconds: the budget in seconds of writing, at the rate that the save before this was written with; where that
            is not known, everything fits.
        max_stale: how many saves old a unit may at most be after any save.
        first: ``weights`` writes all weights in every save, and spends what is left on the optimizer's state;
            ``drift`` treats all units alike.
        exact: as in `Drift`.
        weights: the dtype that weights are stored in if theirs is wider, as in `Moments`.
        moments: the same for the optimizer's state.
    """

    name: ClassVar[str] = "budget"

    fraction: Share | None = None
    bytes: Period | None = None
    seconds: Positive | None = None
    max_stale: Period = 8
    first: Literal["drift", "weights"] = "drift"
    exact: bool = False
    weights: DtypeName = "fp32"
    moments: DtypeName = "fp32"

    def __post_init__(self) -> None:
        check_options(self)
        given = [name for name in ("fraction", "bytes", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise PolicyError(f"The policy 'budget' needs one of fraction, bytes and seconds, and was given {said}.")

    @property
    def needs_drift(self) -> Measure:
        """``exact`` or ``sketch``."""
        return "exact" if self.exact else "sketch"

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return what must be written, and of the rest what drifted most per byte, as long as it fits."""
        budget = self._budget(request)
        known = [info for info in request.units if info.age is not None]
        always = [info for info in known if self.first == "weights" and info.is_weight]
        left = budget - sum(info.cost for info in always)
        spent = set(always)
        rest = [info for info in known if info not in spent]
        due = [*(info for info in request.units if info.age is None), *always]
        for info in self._must(rest, max(left, 0.0)):
            due.append(info)
            left -= info.cost
        chosen = {info.unit for info in due}
        for info in sorted(rest, key=_worth, reverse=True):
            if info.unit not in chosen and info.cost <= left:
                chosen.add(info.unit)
                left -= info.cost
        return [info.unit for info in request.units if info.unit in chosen]

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label each unit on its own, but weights that are always written."""
        together = self.first == "weights"
        return {u.unit: "weights" if together and u.is_weight else str(u.unit) for u in request.units}

    def storage_dtype(self, unit: Unit, dtype: torch.dtype) -> torch.dtype:
        """Return the narrower of a tensor's own dtype and the one chosen for its kind."""
        return narrowed(unit, dtype, self.weights, self.moments)

    def _budget(self, request: SaveRequest) -> float:
        if self.fraction is not None:
            return self.fraction * sum(info.bytes for info in request.units)
        if self.bytes is not None:
            return float(self.bytes)
        return self.seconds * request.rate if self.seconds and request.rate else math.inf

    def _must(self, infos: Iterable[UnitInfo], budget: float) -> Iterable[UnitInfo]:
        """Yield what is overdue, and what has to come early so that later saves can keep both bound and budget."""
        oldest = sorted(infos, key=lambda info: (info.age or 0, _worth(info)), reverse=True)
        needed = backlog = 0.0
        for info in oldest:
            # Those up to this one must be written within so many saves after this one.
            saves = max(self.max_stale + 1 - (info.age or 0), 0)
            backlog += info.cost
            # What no budget can do is spread evenly; else later saves do as much as they can.
            spread = backlog / (saves + 1)
            needed = max(needed, spread if spread > budget else backlog - budget * saves)
        taken = 0.0
        for info in oldest:
            if taken >= needed:
                return
            taken += info.cost
            yield info


def _worth(info: UnitInfo) -> float:
    drift = math.inf if info.drift is None else info.drift
    return drift / max(info.cost, 1)
