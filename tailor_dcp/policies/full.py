"""Everything, each time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from tailor_dcp.policies.base import Policy, SaveRequest
from tailor_dcp.units import Unit


@dataclass(frozen=True)
class Full(Policy):
    """Every unit is due in every save."""

    name: ClassVar[str] = "full"

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return all units."""
        return [info.unit for info in request.units]

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label all units alike."""
        return {info.unit: "all" for info in request.units}
