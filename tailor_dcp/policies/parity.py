"""Layers in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from tailor_dcp.policies.base import Policy, SaveRequest
from tailor_dcp.policies.groups import deal, is_due
from tailor_dcp.policies.options import Period, check_options
from tailor_dcp.units import Unit


@dataclass(frozen=True)
class Parity(Policy):
    """One group of layers a save, the weights and moments of a layer together.

    After any save no unit is more than ``groups - 1`` saves old.

    Attributes:
        groups: how many groups take turns. Numbered layers go by number modulo ``groups``, so for
            a model in which every second block is a much larger mixture of experts, an odd number
            gives more even saves.
    """

    name: ClassVar[str] = "parity"

    groups: Period = 2

    def __post_init__(self) -> None:
        check_options(self)

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return the group whose turn it is, and whatever would become too old."""
        group = deal(request.units, self.groups)
        return [info.unit for info in request.units if is_due(info, request.index, group[info.layer], self.groups)]

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label each unit with its layer's group."""
        group = deal(request.units, self.groups)
        return {info.unit: str(group[info.layer]) for info in request.units}
