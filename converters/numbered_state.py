"""Optimizer states as ``optimizer.state_dict()`` has them: numbered by parameter. Here they get their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tailor_dcp.errors import ConversionError

_OPTIMIZERS = ("optim", "optimizer", "optimizer_state_dict", "optim_state_dict", "optimizer_state")
_BUFFERS = ("running_mean", "running_var", "inv_freq")
_LIKE_THE_PARAMETER = ("exp_avg", "momentum_buffer", "square_avg", "sum", "exp_inf", "acc_delta", "exp_avg_sq")
"""Kinds whose tensors have their parameter's shape."""
_MODELS = ("model", "state_dict", "model_state_dict", "module", "net")


def named(tree: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return a training's dict with the optimizer's states under their parameters' names.

    ``torch.optim`` numbers parameters in the order that the optimizer was given them, which for
    ``Optimizer(model.parameters())`` is the model's own. That is assumed, and held against the shapes.

    Args:
        tree: the dict; unchanged if no optimizer in it is numbered.
        source: the file, for messages.

    Raises:
        ConversionError: the shapes contradict the order.
    """
    key = next((k for k in _OPTIMIZERS if _is_numbered(tree.get(k))), None)
    if key is None:
        return tree
    model = next((tree[k] for k in _MODELS if isinstance(tree.get(k), Mapping)), None)
    if model is None:
        raise ConversionError(
            f"{source} numbers the optimizer's states and holds no model that could name them; save both, or use "
            f"torch.distributed.checkpoint.state_dict.get_state_dict, which names them."
        )
    optimizer = tree[key]
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    names = _names(optimizer, model, numbers, source)
    state = {names[number]: dict(held) for number, held in optimizer["state"].items()}
    groups = [
        {**{k: v for k, v in group.items() if k != "param_names"}, "params": [names[n] for n in group["params"]]}
        for group in optimizer["param_groups"]
    ]
    return {**tree, key: {"state": state, "param_groups": groups}}


def _names(optimizer: Mapping[str, Any], model: Mapping[str, Any], numbers: list[int], source: Path) -> dict[int, str]:
    """Return the name of each numbered parameter: as the optimizer itself tells it, else by order and shape."""
    given = {
        n: name
        for g in optimizer["param_groups"]
        for n, name in zip(g["params"], g.get("param_names", ()), strict=False)
    }
    if len(given) == len(numbers):
        return given
    shapes = [_shape(optimizer["state"].get(number, {})) for number in sorted(numbers)]
    parameters = _parameters(model)
    ways, names_in_order = _aligned(shapes, parameters)
    if len(optimizer["param_groups"]) > 1 and ways == 1 and not _distinct(shapes, parameters):
        ways = 2  # several groups are in an order of their own
    if ways != 1:
        what = "fit in more than one way" if ways else "do not fit"
        raise ConversionError(
            f"{source} numbers the {len(numbers)} states of the optimizer, and their order and shapes {what} the "
            f"model's {len(parameters)} parameters; save with torch.distributed.checkpoint's get_state_dict, which "
            f"names them."
        )
    return dict(zip(sorted(numbers), names_in_order, strict=True))


def _distinct(shapes: Sequence[torch.Size | None], parameters: Sequence[tuple[str, torch.Size]]) -> bool:
    """Tell whether shapes alone name the states, in whatever order they are."""
    known = [shape for _, shape in parameters]
    return None not in shapes and len(set(known)) == len(known)


def _parameters(model: Mapping[str, Any]) -> list[tuple[str, torch.Size]]:
    """Return what may be parameters: a tied weight is one, and the usual buffers are none."""
    seen: set[int] = set()
    found = []
    for fqn, value in model.items():
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            if not fqn.endswith(_BUFFERS):
                found.append((fqn, value.shape))
    return found


def _shape(state: Mapping[str, Any]) -> torch.Size | None:
    """Return the shape that a state tells of its parameter; None if it tells none, as of one never stepped."""
    return next((state[kind].shape for kind in _LIKE_THE_PARAMETER if isinstance(state.get(kind), torch.Tensor)), None)


def _aligned(
    shapes: Sequence[torch.Size | None], parameters: Sequence[tuple[str, torch.Size]]
) -> tuple[int, list[str]]:
    """Name states by parameters in their order, where frozen ones in between may be skipped.

    Returns:
        0, 1, or 2 for more, ways to do so, and one of them.
    """
    spare = len(parameters) - len(shapes)
    if spare < 0:
        return 0, []
    # ways[state][skipped]: how the states from this one on fit, after so many parameters were skipped before it.
    ways = [[1] * (spare + 1)]
    for state in range(len(shapes) - 1, -1, -1):
        row = [0] * (spare + 1)
        for skipped in range(spare, -1, -1):
            here = ways[0][skipped] if shapes[state] in (None, parameters[state + skipped][1]) else 0
            row[skipped] = min(2, here + (row[skipped + 1] if skipped < spare else 0))
        ways.insert(0, row)
    names: list[str] = []
    skipped = 0
    for state, shape in enumerate(shapes) if ways[0][0] else ():
        while shape not in (None, parameters[state + skipped][1]) or not ways[state + 1][skipped]:
            skipped += 1
        names.append(parameters[state + skipped][0])
    return ways[0][0], names


def _is_numbered(value: Any) -> bool:
    """Tell an optimizer's own state dict: its param groups list numbers."""
    groups = value.get("param_groups") if isinstance(value, Mapping) else None
    return isinstance(groups, list) and any(
        isinstance(n, int) for group in groups if isinstance(group, Mapping) for n in group.get("params", ())
    )
