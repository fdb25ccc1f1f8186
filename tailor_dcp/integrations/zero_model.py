"""The weights of a ZeRO engine, under ``model.<fqn>``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_dcp.integrations.zero_engine import layout_of

# What torch.compile and activation checkpointing add to names, and torch's own state dicts leave out.
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")


class EngineModel:
    """Master weights of what is trained; everything else as the module has it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        """Return what DCP saves, or loads into."""
        layout = layout_of(self._engine)
        module = self._engine.module
        state: dict[str, Any] = {}
        # Tied weights under each of their names, as torch's get_state_dict has them.
        for name, parameter in module.named_parameters(remove_duplicate=False):
            piece = layout.pieces.get(parameter)
            state[clean(name)] = piece.within(layout.flats[piece.flat]) if piece else layout.frozen(parameter)
        state.update((clean(name), buffer.detach()) for name, buffer in persistent_buffers(module))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what DCP loaded: it is in the buffers already, and the module does not know yet."""
        layout_of(self._engine).refresh()


def clean(name: str) -> str:
    """Return a parameter's name without what wrappers add to it."""
    return _WRAPPER.sub("", name)


def names(module: torch.nn.Module) -> dict[Tensor, str]:
    """Return the name by which the optimizer's state of each parameter goes: the first, where it has several."""
    return {parameter: clean(name) for name, parameter in module.named_parameters()}


def persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that belong into a checkpoint, by name."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
