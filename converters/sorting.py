"""Sorting a state dict's entries: what of it is weights, optimizer state, param groups, and the training's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.catalog import Catalog
from tailor_dcp.errors import DamagedSourceError
from tailor_dcp.layers import LayerMap
from tailor_dcp.layers import Path as KeyPath
from tailor_dcp.tensors import Given, Readable
from tailor_dcp.units import WEIGHT

from .key_layouts import groups_of, is_group, train_of, with_lists

_MODEL = "model"
_PARAMS = "params"
_TOKEN = "token"  # of a save; no other checkpoint descends from it


def sort(
    source: Path,
    format_: str,
    paths: Mapping[str, KeyPath],
    tensors: Collection[str],
    readable: Callable[[str], Readable],
    value: Callable[[str], Any],
) -> Catalog:
    """Return the catalog of a state dict, in whatever keys it is.

    Args:
        source: where it was found.
        format_: in which format.
        paths: each flattened key with its path in the nested state dict.
        tensors: the keys of tensors.
        readable: returns the tensor of a key.
        value: returns the value of a key, a tensor or not, in memory.
    """
    entries = LayerMap().classify(paths, tensors)
    weights: dict[str, Readable] = {}
    state: dict[str, dict[str, Readable]] = {}
    rest: list[tuple[KeyPath, Any]] = []
    for key, path in paths.items():
        entry = entries.get(key)
        if entry is not None and entry.unit.kind != WEIGHT:
            held = readable(key) if key in tensors else _number(value(key))
            state.setdefault(entry.fqn, {})[entry.unit.kind] = held
        elif entry is not None:
            weights[entry.fqn] = readable(key)
        elif key in tensors and path[0] == _MODEL and len(path) == 2:
            weights[str(path[1])] = readable(key)  # of a model, whatever it is called: a buffer named "steps", say
        else:
            rest.append((path, value(key)))
    groups = groups_of((where, held) for where, held in rest if is_group(where))
    train = train_of((where, held) for where, held in rest if not is_group(where))
    return Catalog(
        source=source,
        format=format_,
        weights=weights,
        state=state,
        groups=tuple(_group(source, list(state) if len(groups) == 1 else [], group) for group in groups),
        train={name: with_lists(held) for name, held in train.items() if name != _TOKEN},
    )


def _group(source: Path, names: list[str], held: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group; one that does not tell its parameters has those of ``names``."""
    group = {_PARAMS: names, **with_lists(held)}
    params = group[_PARAMS]
    if not isinstance(params, list) or not all(isinstance(name, str | int) for name in params):
        raise DamagedSourceError(
            f"{source} has a param group whose params are no list of names; use another checkpoint."
        )
    return group


def _number(value: Any) -> Readable:
    """Return a state that is no tensor, such as a step that an optimizer counts as a plain number, as one."""
    return Given(value if isinstance(value, torch.Tensor) else torch.tensor(float(value)))
