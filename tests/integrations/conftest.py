"""Workers with DeepSpeed: a fleet for each world size, shared with the converters' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.zero_engines import close_fleets, fleet
from tests.support.zero_fleet import ZeroFleet

Fleets = Callable[[int], ZeroFleet]


@pytest.fixture(scope="session")
def zero_fleets() -> Iterator[Fleets]:
    """Fleets by world size, started when they are first asked for and after a failure that they did not survive."""
    yield fleet
    close_fleets()


@pytest.fixture
def zero_fleet(zero_fleets: Fleets) -> ZeroFleet:
    """Two processes."""
    return zero_fleets(2)
