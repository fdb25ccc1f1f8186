"""ZeRO to DCP and back against real DeepSpeed on the CPU, for a table in which every pair of values comes together."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest

from tests.support.zero_cases import COVERING, DTYPES, GROUPS, STAGES, WORLDS, check_case, name_of
from tests.support.zero_engines import Setup
from tests.support.zero_nets import FAMILIES

pytest.importorskip("deepspeed")


def _values(setup: Setup) -> tuple[object, ...]:
    return setup.stage, setup.world, setup.dtype, setup.groups, setup.family


def test_the_table_covers_all_pairs() -> None:
    """So no two values are never tried together."""
    dimensions = (STAGES, WORLDS, DTYPES, GROUPS, FAMILIES)
    for (i, first), (j, second) in combinations(enumerate(dimensions), 2):
        seen = {(_values(setup)[i], _values(setup)[j]) for setup in COVERING}
        assert seen == set(product(first, second))


@pytest.mark.parametrize("setup", COVERING, ids=name_of)
def test_case(setup: Setup, tmp_path: Path) -> None:
    """Weights, moments, steps, groups, and the losses afterwards."""
    check_case(setup, tmp_path)
