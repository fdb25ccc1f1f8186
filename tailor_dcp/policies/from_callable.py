"""A policy made of a plain function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from tailor_dcp.errors import PolicyError
from tailor_dcp.policies.base import Policy, SaveRequest, UnitInfo
from tailor_dcp.policies.options import shown
from tailor_dcp.units import Unit

Selector = Callable[[SaveRequest], Iterable[Unit | UnitInfo | tuple[str, str]]]
"""What users may write in place of a policy."""


@dataclass(frozen=True)
class FromCallable(Policy):
    """What a function of the request returns is due.

    The string is the function's name, for people: it cannot be parsed back. For a save in another
    process the function must be one that pickle finds by name, so no lambda.

    Attributes:
        function: takes the request and returns units, or (layer, kind) pairs.
    """

    name: ClassVar[str] = "callable"

    function: Selector

    def select(self, request: SaveRequest) -> Iterable[Unit]:
        """Return what the function returns, as units.

        Raises:
            PolicyError: it returned something else.
        """
        returned: object = self.function(request)
        if isinstance(returned, str) or not isinstance(returned, Iterable):
            raise PolicyError(
                f"The policy {self} returned {shown(returned)}, where units or (layer, kind) pairs were expected."
            )
        return [self._unit(item) for item in returned]

    def _unit(self, item: object) -> Unit:
        match item:
            case UnitInfo():
                return item.unit
            case (str(layer), str(kind)):
                return Unit(layer, kind)
        raise PolicyError(
            f"The policy {self} returned {shown(item)} among its units, "
            "where a unit or a (layer, kind) pair was expected."
        )

    def __str__(self) -> str:
        function: object = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return str(getattr(function, "__name__", type(function).__name__))
