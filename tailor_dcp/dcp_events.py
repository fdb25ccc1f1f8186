"""What DCP says it is doing, heard through the logger that DCP itself reports to.

A stock ``dcp.load`` knows nothing of us, yet what it loads decides what a later save may
carry. DCP logs the start and the end of each of its calls as a dict, always, to a logger of
its own; one handler there sees them all. Where logging is switched off we are deaf: ``listening()``
says so at the moment, and ``when_deaf`` tells of each call that went unheard.
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
        self.when_deaf: list[Callable[[], None]] = []
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
            try:
                listener(checkpoint_id)
            except Exception:  # a save that is committed must not fail for it
                self.handleError(record)

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
    # Logging may be off just while something is loaded. A dropped record leaves this one trace.
    _logger().isEnabledFor = _is_enabled  # type: ignore[method-assign]


def _is_enabled(level: int) -> bool:
    # logging.config.dictConfig disables every logger that it does not know. This one tells nobody but us.
    _logger().disabled = False
    enabled = logging.Logger.isEnabledFor(_logger(), level)
    for listener in () if enabled else _handler.when_deaf:
        listener()
    return enabled


def listening() -> bool:
    """Tell whether every call of DCP is heard: the handler is attached and logging is on."""
    return _handler in _logger().handlers and _is_enabled(logging.DEBUG)


def subscribe(name: str, event: str, listener: Listener) -> None:
    """Call ``listener(checkpoint_id)`` at each ``event`` (start, end) of DCP's function ``name``."""
    _handler.listeners.setdefault((name, event), []).append(listener)


def when_deaf(listener: Callable[[], None]) -> None:
    """Call ``listener()`` whenever DCP does something that cannot be heard."""
    _handler.when_deaf.append(listener)


def current_call() -> Call | None:
    """Return DCP's innermost public call under way in this thread."""
    stack = _handler.stack()
    return stack[-1] if stack else None
