"""What DCP says it is doing, heard through the logger that DCP itself reports to.

A stock ``dcp.load`` knows nothing of us, yet what it loads decides what a later save may
carry. DCP logs the start and the end of each of its calls as a dict, always, to a logger of
its own; one handler there sees them all. Where logging is switched off we would be deaf,
so ``listening()`` says whether we can be trusted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from torch.distributed.checkpoint import logger as _dcp

Listener = Callable[[str | None], None]


class Call(NamedTuple):
    """One of DCP's public calls under way in this thread."""

    name: str
    checkpoint_id: str | None


class _Handler(logging.Handler):
    """Turns DCP's log records into calls of listeners."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.listeners: dict[tuple[str, str], list[Listener]] = {}
        self.calls = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.msg
        if not isinstance(message, dict) or "func_name" not in message:
            return
        name, event = message["func_name"], message.get("event", "")
        checkpoint_id = message.get("checkpoint_id")
        if name in _CALLS:
            self._track(event, Call(name, checkpoint_id))
        for listener in self.listeners.get((name, event), ()):
            listener(checkpoint_id)

    def _track(self, event: str, call: Call) -> None:
        stack: list[Call] = self.stack()
        if event == "start":
            stack.append(call)
        elif stack:
            stack.pop()

    def stack(self) -> list[Call]:
        if not hasattr(self.calls, "stack"):
            self.calls.stack = []
        return self.calls.stack  # type: ignore[no-any-return]


_CALLS = frozenset({"save", "async_save", "load"})
_handler = _Handler()


def _logger() -> logging.Logger:
    return _dcp._dcp_logger


def start_listening() -> None:
    """Attach the handler; calling again does nothing."""
    if _handler not in _logger().handlers:
        _logger().addHandler(_handler)


def listening() -> bool:
    """Tell whether every call of DCP is heard: the handler is attached and logging is on."""
    logger = _logger()
    return _handler in logger.handlers and logger.isEnabledFor(logging.DEBUG) and not logger.disabled


def subscribe(name: str, event: str, listener: Listener) -> None:
    """Call ``listener(checkpoint_id)`` at each ``event`` (start, end) of DCP's function ``name``."""
    _handler.listeners.setdefault((name, event), []).append(listener)


def current_call() -> Call | None:
    """Return DCP's innermost public call under way in this thread."""
    stack = _handler.stack()
    return stack[-1] if stack else None
