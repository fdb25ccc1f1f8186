"""Param groups of a result whose training's progress comes from a checkpoint of some layers only. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tailor_dcp.catalog import Catalog

PARAMS = "params"
_LR = "lr"
_LAST = "_last_lr"


def whole_groups(train: Catalog, base: Catalog) -> tuple[Mapping[str, Any], ...]:
    """Return the param groups of a training, with those that its checkpoint was not saved with.

    They are in the order of the base, which is the optimizer's own. A group that the training has keeps its
    hyper-parameters. Another gets those that the base has, but the learning rate that the training's scheduler last
    set for it: the base's is that of an older step.

    Args:
        train: where the training's progress comes from.
        base: a checkpoint of the whole model.

    Returns:
        The training's own groups, if it has all that the base has.
    """
    known, wanted = _names(train), _names(base)
    if wanted <= known:
        return tuple(train.groups)
    rates = _rates(train, len(base.groups))
    found: list[Mapping[str, Any]] = []
    for number, group in enumerate(base.groups):
        own = next((one for one in train.groups if {*one[PARAMS]} & {*group[PARAMS]}), None)
        older = {**group, _LR: rates[number]} if rates else group
        found.append({**(own or older), PARAMS: list(group[PARAMS])})
    more = ({**one, PARAMS: [n for n in one[PARAMS] if n not in wanted]} for one in train.groups)
    return (*found, *(one for one in more if one[PARAMS]))


def _names(catalog: Catalog) -> set[str]:
    return {name for group in catalog.groups for name in group[PARAMS]}


def _rates(train: Catalog, count: int) -> list[Any]:
    """Return the learning rates that the scheduler last set, one for each group; none if it does not tell them."""
    scheduler = train.train.get("scheduler")
    told = scheduler.get(_LAST) if isinstance(scheduler, Mapping) else None
    return list(told) if isinstance(told, list | tuple) and len(told) == count else []
