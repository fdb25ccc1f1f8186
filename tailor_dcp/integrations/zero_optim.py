"""The optimizer of a ZeRO engine, under ``optim.state.<fqn>.<kind>`` and ``optim.param_groups.<i>.<name>``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tailor_dcp import rank_state
from tailor_dcp.errors import TailorError, TailorWarning
from tailor_dcp.integrations.blank_state import blank_state
from tailor_dcp.integrations.param_groups import PARAMS, group_places, hyperparameters
from tailor_dcp.integrations.zero_engine import layout_of
from tailor_dcp.integrations.zero_layout import Layout
from tailor_dcp.integrations.zero_model import names
from tailor_dcp.past import loading, source_of_load
from tailor_dcp.units import STEP

_Kinds = dict[str, Any]


class EngineOptim:
    """Moments and steps per parameter, though ZeRO keeps them per flat buffer.

    Args:
        engine: the engine.
        group: the ranks that train it.
    """

    def __init__(self, engine: Any, group: torch.distributed.ProcessGroup | None) -> None:
        self._engine = engine
        self._group = group
        self._blank: dict[int, _Kinds] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what DCP saves, or loads into."""
        layout, called = layout_of(self._engine), names(self._engine.module)
        self._blank = _missing(layout)
        state: dict[str, _Kinds] = {}
        for parameter, piece in layout.pieces.items():
            kinds = self._kinds(layout, piece.flat)
            flat = layout.flats[piece.flat]
            state[called[parameter]] = {
                kind: piece.within(value) if _is_spread(value, flat) else _single(value)
                for kind, value in kinds.items()
            }
        groups = [
            {**_without_params(group), PARAMS: [called[p] for p in parameters]}
            for group, parameters in zip(layout.optimizer.param_groups, layout.groups, strict=True)
        ]
        if loading():
            source = source_of_load()
            groups = group_places(groups, source.metadata if source else None)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what DCP loaded; the moments are in the buffers already."""
        layout, called = layout_of(self._engine), names(self._engine.module)
        for number, kinds in self._blank.items():
            layout.optimizer.state[layout.flats[number]] = kinds
        self._blank = {}
        loaded: list[dict[str, _Kinds]] = [{} for _ in layout.flats]
        for parameter, piece in layout.pieces.items():
            loaded[piece.flat][called[parameter]] = state_dict["state"][called[parameter]]
        uneven = [
            pair
            for flat, states in zip(layout.flats, loaded, strict=True)
            for pair in _take_singles(layout.optimizer.state[flat], flat, states)
        ]
        groups = [[called[p] for p in parameters] for parameters in layout.groups]
        values, notes = hyperparameters(state_dict["param_groups"], groups)
        for group, options in zip(layout.optimizer.param_groups, values, strict=True):
            group.update({name: value for name, value in options.items() if name in group})
        self._say(uneven, notes)

    def _kinds(self, layout: Layout, number: int) -> _Kinds:
        return self._blank.get(number) or layout.optimizer.state[layout.flats[number]]

    def _say(self, uneven: list[tuple[str, str]], notes: list[str]) -> None:
        if rank_state.rank_of(self._group):
            return
        if uneven:
            (old, new), *others = uneven
            more = f" (and {len(others)} more buffers)" if others else ""
            notes = [
                f"ZeRO counts steps for whole buffers, but the checkpoint has {old} and {new} in the same one{more}; "
                f"the newest counts for all.",
                *notes,
            ]
        for note in notes:
            warnings.warn(note, TailorWarning, stacklevel=2)


def _missing(layout: Layout) -> dict[int, _Kinds]:
    """Return a state for each buffer that was never stepped, to be saved or loaded into."""
    lacking = [number for number, flat in enumerate(layout.flats) if not layout.optimizer.state.get(flat)]
    made = blank_state(layout.optimizer, [(layout.group_of[n], layout.flats[n]) for n in lacking])
    return dict(zip(lacking, made, strict=True))


def _is_spread(value: Any, flat: Tensor) -> bool:
    """Tell whether a state has a value for each element.

    Raises:
        TailorError: it has values, but not one for each.
    """
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    if value.shape != flat.shape:
        raise TailorError(
            f"The optimizer keeps a state of size {tuple(value.shape)} for {flat.numel()} weights, so it cannot be "
            f"told which is whose; save this engine with engine.save_checkpoint."
        )
    return True


def _single(value: Any) -> Any:
    """Return a value of a whole buffer as each parameter's own: numbers as torch's optimizers have them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float32)
    return value


def _take_singles(kinds: _Kinds, flat: Tensor, loaded: Mapping[str, _Kinds]) -> list[tuple[str, str]]:
    """Give a buffer the step and the like of its newest parameter; tell of another that is older."""
    singles = [kind for kind, value in kinds.items() if not _is_spread(value, flat)]
    if not singles or not loaded:
        return []
    age: Callable[[str], float] = lambda fqn: float(loaded[fqn].get(STEP, 0))  # noqa: E731 - it is short
    newest, oldest = max(loaded, key=age), min(loaded, key=age)
    for kind in singles:
        kinds[kind] = _as_before(kinds[kind], loaded[newest][kind])
    if age(newest) == age(oldest):
        return []
    return [(f"{oldest} at step {age(oldest):.0f}", f"{newest} at step {age(newest):.0f}")]


def _as_before(old: Any, loaded: Any) -> Any:
    """Return a loaded value in the form in which the optimizer keeps it."""
    if isinstance(old, Tensor):
        return old.copy_(loaded)
    if isinstance(old, int | float) and not isinstance(old, bool):
        return type(old)(loaded)
    return loaded


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != PARAMS}
