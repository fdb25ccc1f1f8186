"""Parameter groups at a load: the checkpoint's are matched with the optimizer's by the parameters in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

PARAMS = "params"
"""The name in a group under which its parameters' FQNs are."""

_KEY = re.compile(r"optim\.param_groups\.(\d+)\.(.+)")
Group = dict[str, Any]


def group_places(own: Sequence[Group], metadata: Metadata | None) -> list[Group]:
    """Return what a checkpoint's groups are loaded into.

    A script of another framework may have other groups, in another order, and options that this
    optimizer does not have; it may lack some that it has. So the places are those of the checkpoint.
    The value there is the optimizer's own, or no parameters at all, in case that nothing is loaded.

    Args:
        own: the optimizer's groups.
        metadata: the checkpoint's; None if it could not be read.
    """
    if metadata is None:
        return [{**group, PARAMS: []} for group in own]
    wanted = {name for group in own for name in group}
    places: dict[int, Group] = {}
    for key, stored in metadata.state_dict_metadata.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in wanted:
            continue
        number, name = int(match[1]), match[2]
        value = [] if name == PARAMS else own[min(number, len(own) - 1)].get(name)
        if isinstance(stored, TensorStorageMetadata) and not isinstance(value, torch.Tensor):
            value = torch.empty(stored.size, dtype=stored.properties.dtype)
        places.setdefault(number, {})[name] = value
    return [places.get(number, {}) for number in range(max(places, default=-1) + 1)]


def hyperparameters(loaded: Sequence[Group], groups: Sequence[Sequence[str]]) -> tuple[list[Group], list[str]]:
    """Return what each of the optimizer's groups takes over, and notes on what could not be told.

    Args:
        loaded: the checkpoint's groups.
        groups: the FQNs of each of the optimizer's groups.
    """
    home = {fqn: number for number, group in enumerate(loaded) for fqn in group.get(PARAMS, ())}
    if not home:
        return [{} for _ in groups], []
    taken: list[Group] = []
    notes = []
    for number, fqns in enumerate(groups):
        sources = sorted({home[fqn] for fqn in fqns if fqn in home})
        values = [_plain(loaded[source]) for source in sources]
        taken.append(values[0] if values else {})
        if any(str(other) != str(values[0]) for other in values):
            notes.append(
                f"Parameters of group {number} are in the checkpoint's groups {sources}, which differ in their "
                f"options; those of group {sources[0]} count for all."
            )
        elif fqns and not values:
            notes.append(f"The checkpoint has no group with {fqns[0]}, so group {number} keeps the options it has.")
    return taken, notes


def _plain(group: Mapping[str, Any]) -> Group:
    return {name: value for name, value in group.items() if name != PARAMS}
