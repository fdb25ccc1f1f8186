"""All weights each time, the optimizer's moments in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from tailor_dcp.policies.base import Policy, SaveRequest
from tailor_dcp.policies.groups import deal, is_due
from tailor_dcp.policies.options import DtypeName, Period, check_options, narrowed
from tailor_dcp.units import Unit


@dataclass(frozen=True)
class Moments(Policy):
    """All weights every save, the moments of one group of layers in turn.

    Adam's moments forget quickly and weights do not, so stale moments cost a resumed run little
    where stale weights cost it much. After any save the weights are fresh, and no moment is more
    than ``every - 1`` saves old.

    Attributes:
        every: each layer's moments are due in every ``every``-th save.
        weights: the dtype that weights are stored in if theirs is wider: ``bf16`` or ``fp16``;
            ``fp32`` leaves them as they are.
        moments: the same for the optimizer's state. Prefer ``bf16``: squared gradients below 3e-8
            become zero in ``fp16``, and Adam divides by their root.
    """

    name: ClassVar[str] = "moments"

    every: Period = 5
    weights: DtypeName = "fp32"
    moments: DtypeName = "fp32"

    def __post_init__(self) -> None:
        check_options(self)

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return all weights, and the moments whose turn it is or that would become too old."""
        group = self._groups(request)
        return [
            info.unit
            for info in request.units
            if info.is_weight or is_due(info, request.index, group[info.layer], self.every)
        ]

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label weights ``weights``, and moments with their layer's group."""
        group = self._groups(request)
        return {info.unit: "weights" if info.is_weight else str(group[info.layer]) for info in request.units}

    def storage_dtype(self, unit: Unit, dtype: torch.dtype) -> torch.dtype:
        """Return the narrower of a tensor's own dtype and the one chosen for its kind."""
        return narrowed(unit, dtype, self.weights, self.moments)

    def _groups(self, request: SaveRequest) -> dict[str, int]:
        # Weights take no turns, so only the moments' bytes are to be near equal.
        return deal((info for info in request.units if not info.is_weight), self.every)
