"""Everything in every other save."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from tailor_dcp.policies import Policy, SaveRequest
from tailor_dcp.units import Unit


@dataclass(frozen=True)
class EveryOther(Policy):
    """Every unit is due in every other save, and none in between."""

    name: ClassVar[str] = "every_other"

    offset: int = 0

    def __post_init__(self) -> None:
        if self.offset not in (0, 1):
            raise ValueError("offset must be 0 or 1")

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return everything or nothing."""
        return [info.unit for info in request.units if request.index % 2 == self.offset]
