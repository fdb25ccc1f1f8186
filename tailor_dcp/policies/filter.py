"""The first and last layers each time, the rest now and then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tailor_dcp.policies.base import Policy, SaveRequest, UnitInfo
from tailor_dcp.policies.groups import is_due
from tailor_dcp.policies.options import Amount, Period, check_options
from tailor_dcp.units import Unit

Stack = str | None


@dataclass(frozen=True)
class Filter(Policy):
    """The first and last numbered layers of each stack every save, the rest every ``every``-th.

    After any save the former are fresh, and no other unit is more than ``every - 1`` saves old.

    Attributes:
        head: how many layers at the start of each stack are always due.
        tail: how many layers at its end are always due.
        every: the rest is due in every ``every``-th save.
        aux: whether layers without a number (embeddings, final norm, head) are ``always`` due or
            go with the ``rest``.
    """

    name: ClassVar[str] = "filter"

    head: Amount = 2
    tail: Amount = 2
    every: Period = 5
    aux: Literal["always", "rest"] = "always"

    def __post_init__(self) -> None:
        check_options(self)

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return what is always due, and the rest if it is its turn."""
        # The rest is one group, with its turn at index 0, every, 2 * every, ... Going by age
        # alone would keep the bound too, but would never bring its units back together.
        always = self._always(request)
        return [
            info.unit for info in request.units if info.unit in always or is_due(info, request.index, 0, self.every)
        ]

    def cohorts(self, request: SaveRequest) -> Mapping[Unit, str]:
        """Label each unit ``always`` or ``rest``."""
        always = self._always(request)
        return {info.unit: "always" if info.unit in always else "rest" for info in request.units}

    def _always(self, request: SaveRequest) -> set[Unit]:
        ends = self._ends(request.units)
        return {
            info.unit
            for info in request.units
            if (self.aux == "always" if info.number is None else info.number in ends[info.stack])
        }

    def _ends(self, units: Iterable[UnitInfo]) -> dict[Stack, set[int]]:
        """Return the numbers at the two ends of each stack.

        They are counted by the numbers that are there, which need not start at 0 nor be without
        gaps, and several layers may share one (a block and its experts).
        """
        numbers: defaultdict[Stack, set[int]] = defaultdict(set)
        for info in units:
            if info.number is not None:
                numbers[info.stack].add(info.number)
        ends: dict[Stack, set[int]] = {}
        for stack, found in numbers.items():
            ordered = sorted(found)
            ends[stack] = {*ordered[: self.head], *ordered[max(0, len(ordered) - self.tail) :]}
        return ends
