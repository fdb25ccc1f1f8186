"""The caller's own entries of a training state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from tailor_dcp.errors import TailorError

RESERVED = frozenset({"scheduler", "dataloader", "rng", "token"})
"""Names under ``train.`` that are ours."""


@runtime_checkable
class HasState(Protocol):
    """Anything with ``state_dict`` and ``load_state_dict``: schedulers, data loaders, samplers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state over."""
        ...


class ExtraState:
    """The caller's own entries: a dict of values and of things with a state, or one thing with a state.

    Args:
        extra: the entries.
        reserved: names that they cannot have.
        owner: who has reserved them, for messages.
    """

    def __init__(
        self, extra: dict[str, Any] | HasState | None, reserved: frozenset[str] = RESERVED, owner: str = "TrainState"
    ) -> None:
        self._extra = {} if extra is None else extra
        self._reserved, self._owner = reserved, owner
        if isinstance(self._extra, dict):
            self._check_names(self._extra)
        elif not isinstance(self._extra, HasState):
            raise TailorError(
                f"extra= is a {type(extra).__name__}, which has no state_dict() and load_state_dict(); "
                f"give a dict or something with a state."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what DCP saves, or loads into."""
        if not isinstance(self._extra, dict):
            state = dict(self._extra.state_dict())
        else:
            state = {k: v.state_dict() if isinstance(v, HasState) else v for k, v in self._extra.items()}
        self._check_names(state)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what DCP loaded."""
        if not isinstance(self._extra, dict):
            self._extra.load_state_dict(state)
            return
        for name, value in state.items():
            owner = self._extra.get(name)
            if isinstance(owner, HasState):
                owner.load_state_dict(value)
            else:
                self._extra[name] = value

    def _check_names(self, extra: Mapping[str, Any]) -> None:
        clash = self._reserved & extra.keys()
        if clash:
            raise TailorError(
                f"extra= holds the name {min(clash)!r}, which {self._owner} itself keeps under train.; rename it."
            )


def restore_keys(value: Any) -> None:
    """Put what DCP loaded under the name of a number, beside the number itself, in its place."""
    if isinstance(value, dict):
        for key in [key for key in value if not isinstance(key, str) and str(key) in value]:
            value[key] = _onto(value[key], value.pop(str(key)))
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        restore_keys(inner)


def _onto(old: Any, loaded: Any) -> Any:
    """Return what was loaded, with the keys that it had when it was saved."""
    if isinstance(old, dict) and isinstance(loaded, dict):
        names = {str(key): key for key in old}
        for name, value in loaded.items():
            key = names.get(name, name)
            old[key] = _onto(old.get(key), value)
        return old
    if isinstance(old, list) and isinstance(loaded, list) and len(old) == len(loaded):
        return [_onto(a, b) for a, b in zip(old, loaded, strict=True)]
    return loaded
