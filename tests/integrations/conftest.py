"""Workers with DeepSpeed: a fleet for each world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.zero_fleet import ZeroFleet

Fleets = Callable[[int], ZeroFleet]


@pytest.fixture(scope="session")
def zero_fleets() -> Iterator[Fleets]:
    """Fleets by world size, started when they are first asked for and after a failure that they did not survive."""
    started: dict[int, ZeroFleet] = {}

    def of(size: int) -> ZeroFleet:
        if size not in started or not started[size].alive:
            started[size] = ZeroFleet(size)
        return started[size]

    yield of
    for workers in started.values():
        if workers.alive:
            workers.close()


@pytest.fixture
def zero_fleet(zero_fleets: Fleets) -> ZeroFleet:
    """Two processes."""
    return zero_fleets(2)
