"""Groups of layers that take turns, and when it is a unit's turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from tailor_dcp.policies.base import UnitInfo


def deal(units: Iterable[UnitInfo], groups: int) -> dict[str, int]:
    """Deal layers into groups that are near equal in bytes.

    A numbered layer goes by its number alone, so that everything that carries a block's
    number (its experts, the same block of a second stack) stays together, and so that a layer
    keeps its group whatever else is in the state. The layers without a number level out the
    bytes: the largest first, each to the group with the fewest bytes so far.

    Args:
        units: the units that take turns; only their bytes count.
        groups: how many groups there are, at least 1.

    Returns:
        The group of each layer, from 0. The same units give the same groups in any order.
    """
    dealt: dict[str, int] = {}
    loads: defaultdict[int, int] = defaultdict(int)
    rest: defaultdict[str, int] = defaultdict(int)
    for info in units:
        if info.number is None:
            rest[info.layer] += info.bytes
        else:
            dealt[info.layer] = info.number % groups
            loads[info.number % groups] += info.bytes

    # There may be more groups than layers, of which only the first empty ones can get any.
    for group in range(min(groups, len(loads) + len(rest))):
        loads.setdefault(group, 0)
    for layer in sorted(rest, key=lambda layer: (-rest[layer], layer)):
        lightest = min(loads, key=lambda group: (loads[group], group))
        dealt[layer] = lightest
        loads[lightest] += rest[layer]
    return dealt


def is_due(info: UnitInfo, index: int, group: int, groups: int) -> bool:
    """Tell whether a unit of one of several groups that take turns is due in this save.

    The turn goes by the save's index and not by age alone, because units that came out of step
    (after another policy, or a save in which some could not be carried) would then stay so for
    ever; by index they are together again at their group's next turn. Age keeps the bound
    meanwhile: with n groups, no unit is more than n - 1 saves old after any save.
    """
    return info.age is None or info.age >= groups or index % groups == group
