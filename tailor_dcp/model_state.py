"""A model and its optimizer as DCP saves and loads them, the odd corners of torch's own calls smoothed."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import (
    _init_optim_state,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from tailor_dcp.past import loading


class ModelState:
    """The weights and buffers, under ``model.<fqn>``."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._elsewhere: list[_Elsewhere] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what DCP saves, or loads into."""
        state = get_model_state_dict(self._model)
        self._elsewhere = _set_aside([state]) if loading() else []
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what DCP loaded."""
        _put_back(self._elsewhere)
        set_model_state_dict(self._model, state_dict)


class OptimState:
    """The optimizer, under ``optim.state.<fqn>.<kind>`` and ``optim.param_groups.<i>.<name>``."""

    def __init__(self, model: torch.nn.Module, optimizers: Optimizer | Iterable[Optimizer]) -> None:
        self._model = model
        self._optimizers = (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)
        self._elsewhere: list[_Elsewhere] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what DCP saves, or loads into."""
        is_target = loading() is not None
        with _complete(self._optimizers, keep=is_target):
            state: dict[str, Any] = dict(get_optimizer_state_dict(self._model, self._optimizers))
        self._elsewhere = _set_aside(state["state"].values()) if is_target else []
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what DCP loaded."""
        _put_back(self._elsewhere)
        set_optimizer_state_dict(self._model, self._optimizers, state_dict)


_Elsewhere = tuple[dict[str, Any], str, ShardedTensor]
"""A dict, a key, and the tensor that belongs there, of which other ranks hold all elements."""


def _set_aside(dicts: Iterable[dict[str, Any]]) -> list[_Elsewhere]:
    """Take out the tensors of which this rank holds nothing, as FSDP1 has them.

    DCP drops them from the plan of a load, then finds that the checkpoint has more keys than the
    plan, takes it for one of an old version of torch, and fails.
    """
    found = [
        (holder, key, value)
        for holder in dicts
        for key, value in holder.items()
        if isinstance(value, ShardedTensor) and not value.local_shards()
    ]
    for holder, key, _ in found:
        del holder[key]
    return found


def _put_back(found: list[_Elsewhere]) -> None:
    for holder, key, value in found:
        holder[key] = value
    found.clear()


@contextmanager
def _complete(optimizers: Sequence[Optimizer], keep: bool) -> Iterator[None]:
    """Give parameters that were never stepped the state they have before a first step, to be saved or loaded into.

    A fresh optimizer asks a checkpoint for the state of all parameters. torch leaves out
    those that never had a gradient, as idle experts have none, so that the checkpoint could
    not be loaded; and where no parameter has state it makes an empty step to get some, but
    leaves the counters at 1, which changes all that is trained after the save.
    """
    lent = [(optimizer, p) for optimizer in optimizers for p in _add_blank_state(optimizer)]
    try:
        yield
    finally:
        for optimizer, parameter in () if keep else lent:
            del optimizer.state[parameter]


def _add_blank_state(optimizer: Optimizer) -> list[torch.Tensor]:
    """Add the missing states and return the parameters that got one. No hook runs, no learning rate moves."""
    idle = [
        {**group, "params": [p for p in group["params"] if not optimizer.state.get(p)]}
        for group in optimizer.param_groups
    ]
    blank: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    twin = object.__new__(type(optimizer))
    twin.__dict__ = {**vars(optimizer), "state": blank, "param_groups": idle}
    # A scheduler wraps `step` in one that is bound to the original.
    twin.__dict__.pop("step", None)
    twin.__dict__ |= {"_optimizer_step_pre_hooks": OrderedDict(), "_optimizer_step_post_hooks": OrderedDict()}
    _init_optim_state(twin)
    for parameter, state in blank.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()
        optimizer.state[parameter] = state
    return list(blank)
