"""The state that an optimizer would have for a flat buffer before its first step."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tailor_dcp.units import STEP


def blank_state(optimizer: Optimizer, buffers: Sequence[tuple[int, Tensor]]) -> list[dict[str, Any]]:
    """Return a state for each buffer, without touching the buffers or the optimizer's own states.

    What an optimizer keeps is found by letting it step a single element, so it need not be known.

    Args:
        optimizer: the optimizer.
        buffers: for each buffer its parameter group, and itself.
    """
    if not buffers:
        return []
    probes = {group: torch.nn.Parameter(flat.detach().new_zeros(1)) for group, flat in buffers}
    for probe in probes.values():
        probe.grad = torch.zeros_like(probe)
    with _lent(optimizer):
        optimizer.param_groups = [{**optimizer.param_groups[g], "params": [probe]} for g, probe in probes.items()]
        # Not optimizer.step(): a scheduler may count calls of that.
        type(optimizer).step(optimizer)
        found = {group: optimizer.state[probe] for group, probe in probes.items()}
    return [{kind: _spread(kind, value, flat) for kind, value in found[group].items()} for group, flat in buffers]


@contextmanager
def _lent(optimizer: Optimizer) -> Iterator[None]:
    """Put groups, states and hooks aside and back again."""
    # A copy of the optimizer would not do: DeepSpeed's own free the memory behind them when they are deleted.
    own = ("param_groups", "state", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    aside = {name: getattr(optimizer, name) for name in own}
    try:
        optimizer.state = defaultdict(dict)
        optimizer._optimizer_step_pre_hooks = OrderedDict()
        optimizer._optimizer_step_post_hooks = OrderedDict()
        yield
    finally:
        for name, value in aside.items():
            setattr(optimizer, name, value)


def _spread(kind: str, value: Any, flat: Tensor) -> Any:
    """Return what a buffer has where a single element has this."""
    if isinstance(value, Tensor) and value.dim():
        return torch.full(flat.shape, value.item(), dtype=value.dtype, device=value.device)
    if kind == STEP:
        return torch.zeros_like(value) if isinstance(value, Tensor) else type(value)(0)
    return value
