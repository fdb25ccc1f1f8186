"""What was unpickled, with the real values in the place of those that stood for them while it was read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

Become = Callable[[Any], Any]
"""Returns the real value that one stands for, an empty one of what can be filled; any other itself."""

_PLAIN = frozenset({bool, bytes, complex, float, int, str, type(None)})


def settled(value: Any, become: Become) -> Any:
    """Return nested values with the real ones in the place of what stands for them.

    Lists, dicts and sets are changed in place, so that what is shared, or holds itself, stays so.
    """
    return _Settling(become)(value)


class _Settling:
    def __init__(self, become: Become) -> None:
        self._become = become
        # What was replaced is held as well: something else could get its id.
        self._known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        if id(value) in self._known:
            return self._known[id(value)][1]
        new = self._become(value)
        if new is value and not _holds(value):
            return value
        self._known[id(value)] = value, new
        if isinstance(new, deque):
            new.extend(map(self, value))
        elif new is not value and isinstance(new, MutableMapping):
            new.update((self(key), self(held)) for key, held in value.items())
        elif new is value:
            self._known[id(value)] = value, self._filled(value)
        return self._known[id(value)][1]

    def _filled(self, value: Any) -> Any:
        if isinstance(value, MutableMapping):
            self._map(value)
        elif isinstance(value, list):
            value[:] = map(self, value)
        elif isinstance(value, set):
            parts = self._all(value)
            if parts is not None:
                value.clear()
                value.update(parts)
        elif type(value) in (tuple, frozenset):
            parts = self._all(value)
            return value if parts is None else type(value)(parts)
        elif type(getattr(value, "__dict__", None)) is dict:
            self(vars(value))
        return value

    def _map(self, value: MutableMapping[Any, Any]) -> None:
        keys = self._all(value)
        if keys is None:
            for key, held in list(value.items()):
                if (new := self(held)) is not held:
                    value[key] = new
        else:
            pairs = [(key, self(held)) for key, held in zip(keys, value.values(), strict=True)]
            value.clear()
            value.update(pairs)

    def _all(self, parts: Iterable[Any]) -> list[Any] | None:
        """Return parts as they shall be; None if they are so already."""
        new = list(map(self, parts))
        return new if any(a is not b for a, b in zip(new, parts, strict=True)) else None


def _holds(value: Any) -> bool:
    return isinstance(value, MutableMapping | list | tuple | set | frozenset) or hasattr(value, "__dict__")
