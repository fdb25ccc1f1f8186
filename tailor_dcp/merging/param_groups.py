"""Param groups of a merged checkpoint: their lists of names follow the renames. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LIST = re.compile(r"(?:.*\.)?param_groups\.\d+\.params")
_FLAT = re.compile(r"(?P<head>(?:.*\.)?param_groups\.)(?P<fqn>.+)(?P<tail>\.[^.]+)")


def is_list(key: str) -> bool:
    """Tell whether a key of a flattened state dict is a param group's list of names."""
    return _LIST.fullmatch(key) is not None


def renamed_list(names: Any, renamed: Mapping[str, Sequence[str]], dropped: Iterable[str]) -> Any:
    """Return a group's list of names as the result has it; what is no such list stays as it is."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return names
    gone = set(dropped)
    found = (new for old in names for new in renamed.get(old, () if old in gone else (old,)))
    return list(dict.fromkeys(found))


def renamed_keys(
    keys: Iterable[str], renamed: Mapping[str, Sequence[str]], dropped: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Return what each key is called in the result, for hyper-parameters that are stored under parameters' names.

    So does ``flatten_optimizer_state_dict=True``: ``optim.param_groups.<fqn>.lr``.
    """
    gone = set(dropped)
    found = {}
    for key in keys:
        match = _FLAT.fullmatch(key)
        fqn = match["fqn"] if match else ""
        if match and (fqn in renamed or fqn in gone):
            found[key] = tuple(f"{match['head']}{new}{match['tail']}" for new in renamed.get(fqn, ()))
        else:
            found[key] = (key,)
    return found
