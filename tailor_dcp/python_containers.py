"""Python's deques and default dicts in pickles, which torch's ``weights_only`` unpickler makes none of.

It fills plain lists and dicts alone. So each deque and each default dict is a plain one while it is read, and what it
shall become is remembered. What a default dict calls for what is missing is one of a few classes of Python's, and
nothing in a pickle can call it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from pickle import UnpicklingError
from typing import Any


class _Class:
    """One of Python's classes, which a pickle may name and not call."""

    def __init__(self, made: type) -> None:
        self.made = made

    def __call__(self, *_: Any) -> Any:
        raise UnpicklingError(f"a {self.made.__name__} is made unusually")


_CLASSES = tuple(map(_Class, (bool, dict, float, int, list, str, tuple)))


class Containers:
    """The deques and default dicts of one pickle, and what they are while it is read."""

    def __init__(self) -> None:
        # What was made is held as well: something else could get its id.
        self._made: dict[int, tuple[Any, deque[Any] | defaultdict[Any, Any]]] = {}
        self.names: tuple[tuple[Any, str], ...] = (
            (self._deque, "collections.deque"),
            (self._defaultdict, "collections.defaultdict"),
            *((one, f"builtins.{one.made.__name__}") for one in _CLASSES),
        )
        """What to build for the names in a pickle."""

    def _deque(self, content: Any = (), longest: Any = None) -> list[Any]:
        if content != () or not (longest is None or (type(longest) is int and longest >= 0)):
            raise UnpicklingError("a deque is made unusually")
        made: list[Any] = []
        self._made[id(made)] = made, deque(maxlen=longest)
        return made

    def _defaultdict(self, missing: Any = None, *more: Any) -> dict[Any, Any]:
        if more or not (missing is None or missing is set or type(missing) is _Class):  # torch makes sets by itself
            raise UnpicklingError("a defaultdict is made unusually")
        made: dict[Any, Any] = {}
        self._made[id(made)] = made, defaultdict(missing.made if type(missing) is _Class else missing)
        return made

    def become(self, value: Any) -> Any:
        """Return what a value that was read is to become; itself where that is nothing else."""
        if type(value) is _Class:
            return value.made
        return self._made[id(value)][1] if id(value) in self._made else value
