"""Layouts of keys: how different trainers name the same things in a DCP checkpoint. Pure arithmetic on keys.

Reading, the names alone tell what is a weight and what is optimizer state (``tailor_dcp.layers``), whoever
wrote them. Writing, one of the layouts below is asked for with ``--keys``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tailor_dcp.layers import Path as KeyPath

GROUPS = "param_groups"
PARAMS = "params"
STEP = "step"
_SCHEDULERS = frozenset({"lr_scheduler", "scheduler", "lr_schedulers"})

State = dict[str, Any]
Values = Iterable[tuple[KeyPath, Any]]


# Reading ------------------------------------------------------------------------------------------------


def groups_of(values: Values) -> tuple[dict[str, Any], ...]:
    """Return the param groups among the entries of a state dict, nested or flattened by parameter.

    ``flatten_optimizer_state_dict=True`` gives every parameter its own hyper-parameters; those that
    agree in all of them are one group again.
    """
    nested: dict[int, dict[str, Any]] = {}
    flat: dict[str, dict[str, Any]] = {}
    for path, value in values:
        if GROUPS in path and isinstance(path[path.index(GROUPS) + 1], int):
            at = path.index(GROUPS)
            group = nested.setdefault(int(path[at + 1]), {})
            _put(group, path[at + 2 :], value)
        elif (rest := _flat_group(path)) is not None:
            fqn, _, name = rest.rpartition(".")
            flat.setdefault(fqn, {})[name] = value
    return tuple(nested[i] for i in sorted(nested)) or _regrouped(flat)


def is_group(path: KeyPath) -> bool:
    """Tell whether a path leads to a param group's value."""
    return GROUPS in path[:-1] or _flat_group(path) is not None


def train_of(values: Values) -> dict[str, Any]:
    """Return the entries that belong to training itself, as they go under ``train.``."""
    train: dict[str, Any] = {}
    for path, value in values:
        inner = path[1:] if path[0] == "train" and len(path) > 1 else path
        if inner[0] in _SCHEDULERS:
            inner = ("scheduler", *inner[1:])
        _put(train, inner, value)
    kept = train.get("train_state")
    if STEP not in train and isinstance(kept, Mapping) and STEP in kept:
        train[STEP] = int(kept[STEP])
    return train


def _flat_group(path: KeyPath) -> str | None:
    """Return ``<fqn>.<name>`` of a path whose last part is ``param_groups.<fqn>.<name>``, alone or in one string."""
    last = path[-1]
    if not isinstance(last, str):
        return None
    if len(path) > 1 and path[-2] == GROUPS:
        return last
    before, found, rest = last.partition(f"{GROUPS}.")
    return rest if found and (not before or before.endswith(".")) and "." in rest else None


def _regrouped(flat: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    groups: dict[str, dict[str, Any]] = {}
    for fqn, values in flat.items():
        group = groups.setdefault(repr(sorted(values.items())), {**values, PARAMS: []})
        group[PARAMS].append(fqn)
    return tuple(groups.values())


def _put(tree: dict[Any, Any], path: KeyPath, value: Any) -> None:
    """Put a value at its place among nested dicts; a list's numbers become keys until ``lists`` makes lists of them."""
    for part in path[:-1]:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            return  # a name is both a value and a container: what came first stays
        tree = below
    tree[path[-1]] = value


def with_lists(tree: Any) -> Any:
    """Make lists of the dicts whose keys are 0, 1, 2, …: DCP's paths tell them apart from dicts only by that."""
    if not isinstance(tree, dict):
        return tree
    made = {key: with_lists(value) for key, value in tree.items()}
    if made and list(made) == list(range(len(made))):
        return list(made.values())
    return made


# Writing ------------------------------------------------------------------------------------------------


def parts_of(state: State, keys: str) -> dict[str, State]:
    """Return what goes into which sub-folder's checkpoint, in a layout of keys.

    Args:
        state: the nested state dict with the entries ``model``, ``optim``, ``train``.
        keys: a name in ``LAYOUTS``.
    """
    return LAYOUTS[keys](state)


def _tailor(state: State) -> dict[str, State]:
    return {"": state}


def _torchtitan(state: State) -> dict[str, State]:
    train = dict(state.get("train", {}))
    made: State = dict(state["model"])
    if "optim" in state:
        made["optimizer"] = _flattened(state["optim"])
    if "scheduler" in train:
        made["lr_scheduler"] = train.pop("scheduler")
    progress = {**train.pop("train_state", {})}
    if STEP in train:
        progress.setdefault(STEP, train.pop(STEP))
    if progress:
        made["train_state"] = progress
    if train:
        made["train"] = train
    return {"": made}


def _accelerate(state: State) -> dict[str, State]:
    parts: dict[str, State] = {"pytorch_model_fsdp_0": {"model": state["model"]}}
    if "optim" in state:
        parts["optimizer_0"] = {"optimizer": state["optim"]}
    return parts


def _transformers(state: State) -> dict[str, State]:
    return {"optimizer": {"optimizer": _flattened(state["optim"])}} if "optim" in state else {}


def _flattened(optim: Mapping[str, Any]) -> State:
    """Return an optimizer's state as ``flatten_optimizer_state_dict=True`` has it."""
    flat: State = {
        f"state.{fqn}.{kind}": value for fqn, kinds in optim.get("state", {}).items() for kind, value in kinds.items()
    }
    for group in optim.get(GROUPS, ()):
        for fqn in group[PARAMS]:
            flat |= {f"{GROUPS}.{fqn}.{name}": value for name, value in group.items() if name != PARAMS}
    return flat


LAYOUTS: dict[str, Callable[[State], dict[str, State]]] = {
    "tailor": _tailor,
    "torchtitan": _torchtitan,
    "accelerate": _accelerate,
    "transformers": _transformers,
}
"""The layouts that can be written. ``tailor`` is also what ``get_state_dict`` gives."""
