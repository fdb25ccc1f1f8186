"""Lists of parameters' names in a merged checkpoint, as param groups have them, follow the renames. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LISTS = ("params", "param_names")
"""Keys of a param group that name parameters; the second is there where an optimizer was given names itself."""

_LIST = re.compile(rf"(?:.*\.)?param_groups\.\d+\.(?:{'|'.join(LISTS)})|train\.zero\.(?:buffers|frozen)")
_FLAT = re.compile(r"(?P<head>(?:.*\.)?param_groups\.)(?P<fqn>.+)(?P<tail>\.[^.]+)")


def is_list(key: str) -> bool:
    """Tell whether a key of a flattened state dict is a param group's list of names, or one of an engine's."""
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
) -> dict[str, list[tuple[str, str, str]]]:
    """Return what each key is called in the result, for hyper-parameters that are stored under parameters' names.

    So does ``flatten_optimizer_state_dict=True``: ``optim.param_groups.<fqn>.lr``.

    Returns:
        For each key the new ones, each with the parameter's old name in it and the new one.
    """
    gone = set(dropped)
    found = {}
    for key in keys:
        match = _FLAT.fullmatch(key)
        fqn = match["fqn"] if match else ""
        if match and (fqn in renamed or fqn in gone):
            found[key] = [(f"{match['head']}{new}{match['tail']}", fqn, new) for new in renamed.get(fqn, ())]
        else:
            found[key] = [(key, "", "")]
    return found
